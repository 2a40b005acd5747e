from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import typer

from data.manifest import Manifest, ShardFile, Split, write_manifest
from launch.cli.checkpoint_argument import choose_checkpoint
from launch.cli.checkpoints import checkpoints
from launch.cli.export import export
from launch.cli.import_hf import import_folder
from launch.cli.next_line import tool
from launch.cli.usage import system_mistake
from launch.evaluate.card_facts import facts_of_run
from launch.evaluate.verification import LOGIT_TOLERANCE, verification_tokens, verify_checkpoint
from launch.train.run_choice import point_latest
from launch.train.run_folder import RunFolder
from launch.train.run_header import RunHeader
from model.model_card import ArithmeticFact, ValidationFact, render_card
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe
from parallel.checkpoint import save_tensors
from parallel.checkpoint_files import MANIFEST_FILE


def begun_run(runs: Path, name: str, steps: tuple[int, ...], overrides: tuple[str, ...] = ()) -> RunFolder:
    """A run's folder whose checkpoints hold their recipe only."""
    recipe = load_recipe("tiny", overrides).recipe
    run = RunFolder.of(runs, name, recipe)
    run.create()
    run.write_recipe(dump_yaml(recipe), RunHeader("tiny", "0", "0"))
    run.metrics_file.write_text("")
    for step in steps:
        (run.checkpoints / str(step)).mkdir(parents=True)
        (run.checkpoints / str(step) / "recipe.yaml").write_text(dump_yaml(recipe))
        (run.checkpoints / str(step) / MANIFEST_FILE).touch()
        (run.checkpoints / str(step) / "manifest.json").write_text("{}")
    return run


def test_a_run_means_its_newest_step_however_it_is_named(tmp_path: Path) -> None:
    run = begun_run(tmp_path / "runs", "tiny-1", (200, 1100, 400))
    point_latest(tmp_path / "runs", run)
    for argument in ("tiny-1", "latest", str(tmp_path / "runs/latest"), str(run.path), str(run.checkpoints / "1100")):
        chosen = choose_checkpoint(argument, tmp_path / "runs")
        assert (chosen.folder, chosen.step) == (run.checkpoints / "1100", 1100)
        assert chosen.run is not None
        assert chosen.run.path == run.path


def test_a_run_with_checkpoints_elsewhere_is_found_from_both_sides(tmp_path: Path) -> None:
    elsewhere = tmp_path / "nvme"
    run = begun_run(tmp_path / "runs", "tiny-1", (3, 5), (f"checkpoints.checkpoints_path={elsewhere}",))
    for argument, step in (("tiny-1", 5), (str(elsewhere / "tiny-1" / "3"), 3)):
        chosen = choose_checkpoint(argument, tmp_path / "runs")
        assert (chosen.folder, chosen.step, chosen.run) == (elsewhere / "tiny-1" / str(step), step, run)


def test_a_step_that_was_copied_out_of_its_run_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    text = dump_yaml(load_recipe("tiny").recipe)
    for name, step in (("best", 5), ("2024", None), ("2025", 7)):
        save_tensors(tmp_path / name, [], {"step": step or 0}, {"recipe.yaml": text})
        assert choose_checkpoint(str(tmp_path / name), tmp_path / "runs").step == step


def test_an_export_is_not_put_among_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = begun_run(Path("runs"), "tiny-1", (3,))
    elsewhere = begun_run(Path("runs"), "tiny-2", (3,), ("checkpoints.checkpoints_path=nvme",))
    for out in (run.checkpoints, run.checkpoints / "4", run.checkpoints / "3" / "export", elsewhere.checkpoints / "4"):
        with pytest.raises(UserError, match=r"expected a folder that is not among the checkpoints of a run"):
            export("tiny-2", out)
        assert not (out / "config.json").exists() and run.steps() == elsewhere.steps() == [3]


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = begun_run(Path("runs"), "tiny-1", (3,))
    with pytest.raises(UserError, match=r"checkpoints/3/manifest\.json: damaged"):
        export("tiny-1", Path("out"))
    (run.checkpoints / "3" / "recipe.yaml").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"checkpoints/3/recipe\.yaml: cannot be read"):
        export("tiny-1", Path("out"))
    assert not Path("out").exists()


def test_an_imported_checkpoint_has_no_run(tmp_path: Path) -> None:
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / "recipe.yaml").write_text(dump_yaml(load_recipe("tiny").recipe))
    chosen = choose_checkpoint(str(tmp_path / "imported"), tmp_path / "runs")
    assert (chosen.step, chosen.run) == (None, None)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    run = begun_run(tmp_path / "runs", "tiny-1", ())
    with pytest.raises(UserError, match="did you mean tiny-1"):
        choose_checkpoint("tinny-1", tmp_path / "runs")
    with pytest.raises(UserError, match="no checkpoint in"):
        choose_checkpoint("tiny-1", tmp_path / "runs")
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        choose_checkpoint(str(tmp_path), tmp_path / "runs")
    assert run.exists()


def test_the_card_reports_the_records_of_its_own_step(tmp_path: Path) -> None:
    run = begun_run(tmp_path / "runs", "tiny-1", (1100,), (f"corpus.path={tmp_path / 'corpus'}",))
    shard = ShardFile(name="a.ds", size=200, sha256="", index_sha256="", tokens=100, documents=1)
    manifest = Manifest(
        source="prose",
        dtype="uint16",
        vocab_size=1024,
        eos_token_id=0,
        tokenizer_sha256="",
        settings_sha256="",
        train=Split(),
        validation=Split(files=(shard,), text_bytes=250),
    )
    write_manifest(tmp_path / "corpus" / "prose", manifest)
    events = [
        {"event": "validation", "step": 0, "validation_loss": {"prose": 7.4, "code": 7.4}},
        {"event": "validation", "step": 1100, "validation_loss": {"prose": 5 * log(2), "code": 3.6, "maths": None}},
        {
            "event": "evaluation",
            "step": 1100,
            "bigram_bits_per_byte": {"prose": 2.5},
            "arithmetic": {"correct": 390, "total": 400},
        },
    ]
    run.metrics_file.write_text("".join(json.dumps(event) + "\n" for event in events))
    facts = facts_of_run(run, load_recipe(str(run.recipe_file)).recipe, 1100, name="my-model")
    assert facts.recipe == "tiny"
    assert facts.tokens == 1100 * 12 * 256
    assert [stage.start_step for stage in facts.stages] == [1, 551, 793]
    assert facts.validation[0] == ValidationFact("prose", 5 * log(2), pytest.approx(2.0), 2.5)
    assert facts.validation[1:] == (ValidationFact("code", 3.6),)
    assert facts.arithmetic == ArithmeticFact(390, 400)
    assert "| prose | 3.466 | 2.000 | 2.500 |" in render_card(facts)
    assert "390" not in render_card(replace(facts, arithmetic=None))


@pytest.mark.parametrize(
    "junk", [3, None, [1], "x", {}, {"prose": "x"}, {"prose": [1]}, {"correct": 0, "total": 0}, {"total": 4}]
)
def test_records_that_are_no_figures_are_left_out_of_the_card(junk: object, tmp_path: Path) -> None:
    run = begun_run(tmp_path / "runs", "tiny-1", (1100,))
    events = [
        {"event": "validation", "step": 1100, "validation_loss": junk},
        {"event": "evaluation", "step": 1100, "bigram_bits_per_byte": junk, "arithmetic": junk},
    ]
    run.metrics_file.write_text("".join(json.dumps(event) + "\n" for event in events))
    facts = facts_of_run(run, load_recipe(str(run.recipe_file)).recipe, 1100)
    assert facts.arithmetic is None and "prose" not in {fact.source for fact in facts.validation}
    assert "## How to load it" in render_card(facts)


def test_verification_reads_real_text(tmp_path: Path) -> None:
    tokens = verification_tokens(tmp_path, vocab_size=256)
    assert tokens.shape == (2, 64)
    assert bytes(tokens[0].tolist()).decode().startswith('The "with" statement')


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 SmolLM3 of transformers' own making, with a tokenizer whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "hf"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(["<|end|>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    config = SmolLM3Config(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(3)
    SmolLM3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_import_then_export_gives_the_folder_back(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    import_folder(hf_dir, Path("imported"))
    export("imported", Path("again"), verify=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("SmolLM3ForCausalLM of ")
    assert any(line.startswith("verified: logits differ by at most") for line in lines)
    assert lines[-1].startswith(f"next: {tool('python')} -c ")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        before, after = (hf_dir / name), (tmp_path / "again" / name)
        if name == "model.safetensors":
            assert_same_tensors(before, after)
        else:
            assert json.loads(before.read_text()) == json.loads(after.read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "imported"]


def assert_same_tensors(before: Path, after: Path) -> None:
    import torch
    from safetensors.torch import load_file

    first, second = load_file(before), load_file(after)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def test_verification_fails_for_an_export_of_other_weights(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    import_folder(hf_dir, Path("imported"))
    export("imported", Path("out"))
    recipe = load_recipe("imported/recipe.yaml").recipe
    assert verify_checkpoint(Path("imported"), recipe, Path("out")) <= LOGIT_TOLERANCE
    tensors = load_file("out/model.safetensors")
    name = "model.layers.3.self_attn.k_proj.weight"
    save_file(tensors | {name: torch.flip(tensors[name], [0])}, "out/model.safetensors", metadata={"format": "pt"})
    assert verify_checkpoint(Path("imported"), recipe, Path("out")) > 100 * LOGIT_TOLERANCE


def test_an_import_into_a_folder_that_is_not_empty_is_refused(hf_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        import_folder(hf_dir, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_links_in_a_circle_are_refused_as_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    begun_run(tmp_path / "runs", "tiny-1", (3,))
    for link in (tmp_path / "loop", tmp_path / "runs" / "loop"):
        link.symlink_to(link.name)
    with pytest.raises(UserError, match="loop: is not a folder"):
        export("tiny-1", Path("loop"))
    with pytest.raises(UserError, match="loop: no such folder, and no such run"):
        export("loop", Path("out"))
    with pytest.raises(UserError, match="loop: no such run"):
        checkpoints("list", "loop")


def test_a_step_that_was_renamed_is_not_exported_under_its_new_name(small_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine" / "checkpoints" / "30"
    recipe = load_recipe(str(small_file)).recipe
    save_tensors(folder, [], {"step": 10}, {"recipe.yaml": dump_yaml(recipe)})
    (tmp_path / "runs" / "mine" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="checkpoints/30: the state after step 10, called 30"):
        export(str(folder), tmp_path / "out")


def test_a_full_disk_is_named(
    hf_dir: Path,
    tmp_path: Path,
    mount: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    import_folder(hf_dir, Path("imported"))
    disk = mount("128k")
    with pytest.raises(OSError) as raised:
        export("imported", disk / "out")
    assert str(system_mistake(raised.value)) == f"{disk / 'out'}: No space left on device"
    with pytest.raises(typer.Exit) as ended:
        import_folder(hf_dir, disk / "out")
    assert ended.value.exit_code == 1 and list(disk.iterdir()) == []
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {disk / 'out'}: 0.3 MB are needed in ")


def test_where_nothing_can_be_written_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = begun_run(Path("runs"), "tiny-1", (3,))
    (tmp_path / "file").touch()
    for write in (lambda: export("tiny-1", Path("file/out")), lambda: import_folder(Path("none"), Path("file/out"))):
        with pytest.raises(UserError, match=r"file/out: cannot be made: \S+/file is not a folder that can be written"):
            write()
    Path("kept").mkdir()
    Path("kept", "mine").touch()
    with pytest.raises(UserError, match="kept: is not empty"):  # though the checkpoint is damaged as well
        export(str(run.checkpoints / "3"), Path("kept"))
