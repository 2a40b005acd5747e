"""`data show`, `data plan` and `data verify` as a user calls them."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_data import corpus_recipe, recipe_with, write_jsonl, write_source

from data.inspection import document_parts
from data.manifest import write_manifest
from data.plan import DataPlan
from data.staging import plan_staging, stage
from data.tokenization import tokenize
from data.transfer import Watch
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe

RUN = "from launch.cli.main import main; main()"
STAGES = [(1, 3.0, 1.0), (11, 1.0, 1.0)]


def run(*arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, "data", *arguments]
    return subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe with two sources of 20 documents of 30 tokens each, all tokens different."""
    for number, name in enumerate(("one", "two")):
        documents = np.arange(600).reshape(20, 30) + 600 * number
        write_source(tmp_path / name, [documents[:7], documents[7:]], vocab_size=1200)
    stages = [(first, {str(tmp_path / "one"): a, str(tmp_path / "two"): b}) for first, a, b in STAGES]
    recipe = recipe_with(stages, sequence_length=50, global_batch_size=8, train_steps=20, vocab_size=1200)
    (tmp_path / "mine.yaml").write_text(dump_yaml(recipe))
    return tmp_path


def test_a_damaged_manifest_has_a_way_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "lines.jsonl", 60)
    sources = [{"name": "lines", "reader": "jsonl", "path": str(tmp_path / "lines.jsonl")}]
    recipe = corpus_recipe(tmp_path / "mine", sources)
    tokenize(recipe, "mine.yaml")
    (tmp_path / "mine.yaml").write_text(dump_yaml(recipe))
    manifest = tmp_path / "mine" / "lines" / "manifest.json"
    manifest.write_text("{")
    said = f"move the folder {manifest.parent} away and run `nanotron-recipes tokenize RECIPE`"
    done = run("plan", "mine.yaml", where=tmp_path)
    assert done.returncode == 2 and f"{manifest}: the file: Invalid JSON" in done.stderr and said in done.stderr
    with pytest.raises(UserError, match=r"move the folder .* tokenize RECIPE"):
        tokenize(recipe, "mine.yaml")
    shutil.rmtree(manifest.parent)
    tokenize(recipe, "mine.yaml")
    staged = load_recipe(str(tmp_path / "mine.yaml"), [f"data_staging.path={tmp_path / 'nvme'}"]).recipe
    stage(staged, plan_staging(staged, Watch()), Watch())
    copy = next((tmp_path / "nvme").rglob("manifest.json"))
    copy.write_text("{")
    with pytest.raises(UserError, match="data stage RECIPE` on this machine, which writes it again"):
        DataPlan.from_recipe(staged)
    stage(staged, plan_staging(staged, Watch()), Watch())
    assert DataPlan.from_recipe(staged).fingerprint == DataPlan.from_recipe(recipe).fingerprint


def test_a_damaged_manifest_of_shards_from_elsewhere_is_to_be_brought_again(folder: Path) -> None:
    (folder / "one" / "manifest.json").write_text("{")
    done = run("verify", "mine.yaml", where=folder)
    assert done.returncode == 2 and done.stderr.endswith("; bring it again from where it was made\n")


def test_show_has_sources_documents_ids_and_masks(folder: Path) -> None:
    done = run("show", "mine.yaml", "--step", "2", "--samples", "2", "--first", "1", where=folder)
    assert done.returncode == 0, done.stderr
    assert "step 2, stage 'stage 0': 8 sequences of 50 tokens" in done.stdout
    assert "sequences by source: one 6, two 2" in done.stdout
    assert "token ids instead of text" in done.stdout
    assert [f"sequence {number}: " in done.stdout for number in range(4)] == [False, True, True, False]


def test_the_parts_of_a_sample_are_its_documents(folder: Path) -> None:
    """Every token is different and a document has 30: all can be told from the tokens alone."""
    plan = DataPlan.from_recipe(load_recipe(str(folder / "mine.yaml")).recipe)
    for step in (1, 12):
        parts = list(document_parts(plan, step, range(8)))
        for part in parts:
            assert (part.tokens // 600 == part.source.endswith("two")).all()
            places = part.tokens % 600
            assert set((places // 30).tolist()) == {part.document}
            assert part.begins == (places[0] % 30 == 0)
            assert part.masked.tolist() == [part.first + i for i in np.flatnonzero(places % 30 == 29).tolist()]
        tokens = np.concatenate([part.tokens for part in parts])
        batch = plan.step(step, dp=1, dp_rank=0, num_micro_batches=1, micro_batch_size=8).micro_batches[0]
        assert np.array_equal(tokens, batch.input_ids.ravel())


def test_a_batch_of_which_only_the_files_that_are_read_are_here_is_shown(tmp_path: Path) -> None:
    """A sequence begins with a file's first token, and the file before it is not here."""
    files = np.arange(1200).reshape(12, 4, 25)
    write_source(tmp_path / "shared", files, vocab_size=1200)
    stages = [(1, {str(tmp_path / "shared"): 1.0})]
    changes = {"sequence_length": 50, "global_batch_size": 1, "train_steps": 3, "vocab_size": 1200}
    recipe = recipe_with(stages, **changes, data_staging={"path": str(tmp_path / "nvme")})  # type: ignore[arg-type]
    stage(recipe, plan_staging(recipe), Watch())
    here = {int(path.stem) for path in (tmp_path / "nvme").rglob("*.ds") if path.parent.name == "shared"}
    plan = DataPlan.from_recipe(recipe)
    parts = [list(document_parts(plan, step, range(1))) for step in (1, 2, 3)]
    firsts = [int(of_step[0].tokens[0]) for of_step in parts]
    assert any(first % 100 == 0 and first // 100 - 1 not in here for first in firsts)
    assert [[part.begins for part in of_step] for of_step in parts] == [[True, True]] * 3


def test_a_step_beyond_the_run_and_a_sequence_beyond_the_batch_are_refused(folder: Path) -> None:
    for arguments, message in (
        (("--step", "21"), "error: --step 21: expected at most tokens.train_steps 20"),
        (("--step", "1", "--first", "8"), "error: --first 8: expected less than the 8 sequences of a step"),
    ):
        done = run("show", "mine.yaml", *arguments, where=folder)
        assert (done.returncode, done.stderr.strip()) == (2, message)


def test_plan_needs_manifests_alone_and_draws_what_it_counts(folder: Path) -> None:
    for shard in [*folder.rglob("*.ds"), *folder.rglob("*.index")]:
        shard.unlink()
    done = run("plan", "mine.yaml", "--plot", "plan.png", where=folder)
    assert done.returncode == 0, done.stderr
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in done.stdout.splitlines() if "│" in line}
    # 10 steps of 8 sequences of 50 in each stage; 11 blocks of 50 in a source of 600 tokens.
    assert [cell.strip() for cell in rows["one"]] == ["3.00K", "2.00K", "5.00K", "600", "9.09"]
    assert [cell.strip() for cell in rows["two"]] == ["1.00K", "2.00K", "3.00K", "600", "5.45"]
    assert [cell.strip() for cell in rows["all"]] == ["4.00K", "4.00K", "8.00K", "", ""]
    assert "is read 9.1 times" in done.stdout
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_plan_of_a_run_that_ends_before_a_stage_counts_what_it_has_read_also_of_stages_of_one_name(
    folder: Path,
) -> None:
    (folder / "mine.yaml").write_text((folder / "mine.yaml").read_text().replace("name: stage 1", "name: stage 0"))
    for last, epochs in ((10, "5.45"), (20, "9.09")):
        done = run("plan", "mine.yaml", "--set", f"tokens.train_steps={last}", where=folder)
        rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in done.stdout.splitlines() if "│" in line}
        assert [cell.strip() for cell in rows["one"]][0::4] == ["3.00K", epochs]
        assert ("starts at step 11, beyond the run of 10 steps" in done.stdout) == (last == 10)
        assert f"{last} steps of 8 sequences, {last * 400 / 1000:.2f}K tokens" in done.stdout
        assert "  from step 11: stage 0, sequences of 50 tokens" in done.stdout


def test_plan_without_manifests_counts_tokens_and_says_that_epochs_are_not_known(folder: Path) -> None:
    shutil.rmtree(folder / "two")
    done = run("plan", "mine.yaml", where=folder)
    assert done.returncode == 0 and "1 source has no manifest here, so that their epochs" in done.stdout
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in done.stdout.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["two"]] == ["1.00K", "2.00K", "3.00K", "?", "?"]
    assert [cell.strip() for cell in rows["one"]] == ["3.00K", "2.00K", "5.00K", "600", "9.09"]
    wrong = run("plan", "mine.yaml", "--plot", "plan.txt", where=folder)
    assert wrong.returncode == 2 and "expected a name that ends in .png" in wrong.stderr


def test_verify_is_content_with_what_was_written(folder: Path) -> None:
    done = run("verify", "mine.yaml", where=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("12 of 12 files")


def test_verify_names_a_flipped_bit_a_cut_file_and_a_missing_one(folder: Path) -> None:
    flipped, cut, gone = folder / "one/00001.ds", folder / "two/00000.ds.index", folder / "two/validation/00000.ds"
    content = bytearray(flipped.read_bytes())
    content[100] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-8])
    gone.unlink()
    done = run("verify", "mine.yaml", where=folder)
    assert done.returncode == 1
    *named, counted, remedy = done.stdout.splitlines()
    problems = dict(line.split(": ", 1) for line in named)
    assert problems == {
        str(flipped): "its content is not what its manifest says (sha256)",
        str(cut): "48 bytes, and its manifest says 56",
        str(gone): "No such file or directory",
    }
    assert counted.startswith("9 of 12 files") and done.stderr == ""
    assert remedy == f"next: bring {folder}/one, {folder}/two again from where it was made"


def test_what_verify_says_to_do_about_a_damaged_corpus_mends_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts" / "a.jsonl", 50)
    recipe = corpus_recipe(tmp_path / "corpus", [{"name": "a", "reader": "jsonl", "path": str(tmp_path / "texts")}])
    (tmp_path / "mine.yaml").write_text(dump_yaml(recipe))
    tokenize(recipe, "mine")
    assert run("verify", "mine.yaml", where=tmp_path).returncode == 0
    shard = next((tmp_path / "corpus" / "a").glob("*.ds"))
    shard.write_bytes(bytes(shard.stat().st_size))
    remedy = run("verify", "mine.yaml", where=tmp_path).stdout.splitlines()[-1]
    deletion, again = remedy.removeprefix("next: ").split(" && ")
    assert deletion == f"rm -r {tmp_path}/corpus/a" and again.endswith("nanotron-recipes tokenize mine.yaml")
    shutil.rmtree(deletion.split()[-1])
    tokenize(recipe, "mine")
    assert run("verify", "mine.yaml", where=tmp_path).returncode == 0


def test_verify_tells_nobody_to_delete_shards_that_cannot_be_made_again(tmp_path: Path) -> None:
    """Their text is gone, or they were never made by tokenize: as read from their manifest."""
    write_jsonl(tmp_path / "texts" / "a.jsonl", 50)
    recipe = corpus_recipe(tmp_path / "corpus", [{"name": "a", "reader": "jsonl", "path": str(tmp_path / "texts")}])
    (tmp_path / "mine.yaml").write_text(dump_yaml(recipe))
    (manifest,) = tokenize(recipe, "mine", workers=1)
    shard = next((tmp_path / "corpus" / "a").glob("*.ds"))
    shard.write_bytes(bytes(shard.stat().st_size))
    imported = manifest.model_copy(update={"made_by": "import-megatron"})
    write_manifest(tmp_path / "corpus" / "a", imported)
    by_hand = f"next: bring {tmp_path}/corpus/a again from where it was made"
    assert run("verify", "mine.yaml", where=tmp_path).stdout.splitlines()[-1] == by_hand
    write_manifest(tmp_path / "corpus" / "a", manifest)
    shutil.rmtree(tmp_path / "texts")
    assert run("verify", "mine.yaml", where=tmp_path).stdout.splitlines()[-1] == by_hand
    uploaded = run("verify", "mine.yaml", "--set", "corpus.upload_to=s3://bucket/out", where=tmp_path)
    assert uploaded.stdout.splitlines()[-1] == (
        f"next: bring {tmp_path}/corpus/a again from s3://bucket/out/a (its text is gone)"
    )


def test_verify_of_a_source_that_is_not_there_ends_with_2(folder: Path) -> None:
    shutil.rmtree(folder / "two")
    done = run("verify", "mine.yaml", where=folder)
    assert done.returncode == 2 and f"{folder}/two: no such folder" in done.stderr


def test_a_group_names_its_commands_and_the_nearest(folder: Path) -> None:
    assert "did you mean verify?" in run("verfy", where=folder).stderr
    missing = run(where=folder)
    assert missing.returncode == 2
    assert missing.stderr == "error: data: missing command; see `nanotron-recipes data --help`\n"
