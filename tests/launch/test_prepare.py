"""What is refused before a run begins: what would fail hours later, and what would overwrite something."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_pretraining import small_recipe, write_recipe, write_text

from data.plan import DataPlan
from data.tokenization import tokenize
from launch.train.prepare import PreparedRun, RunRequest, prepare_run
from launch.train.resume import require_data
from launch.train.run_folder import RunFolder
from launch.train.run_lock import HOLDER_FILE, holder_of
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.schema.data import CorpusSource
from parallel.checkpoint_files import Manifest, write_manifest

Prepare = Callable[..., PreparedRun]


@pytest.fixture
def prepare(small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Prepare a run of the small recipe in `tmp_path`, and give it back."""
    monkeypatch.chdir(tmp_path)

    def call(run: str | None = None, *overrides: str, file: Path = small_file) -> PreparedRun:
        prepared = prepare_run(RunRequest(load_recipe(str(file), overrides), run))
        prepared.lock.release()
        return prepared

    return call


@pytest.fixture
def data(small_file: Path) -> str:
    """Fingerprint of what the small recipe reads in its first stage."""
    return DataPlan.from_recipe(load_recipe(str(small_file)).recipe).fingerprint_through(1)


def save(folder: RunFolder, step: int, data: str, name: str | None = None) -> None:
    """A checkpoint without tensors, as far as its manifest goes."""
    write_manifest(folder.checkpoints / (name or str(step)), Manifest(step, data, {}, ()))


EXPORT = "checkpoints.export_at_end=true"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([EXPORT, "model.model_config.use_qk_norm=true"], "use_qk_norm: true with no_rope_layer: 4 has no Hugging"),
        (["logging.wandb=true"], r"wandb is not installed: pip install 'nanotron-recipes\[wandb\]'"),
        (
            ["checkpoints.checkpoints_path=file/below"],
            r"file/below/mine: checkpoints cannot be written here \(Not a dir",
        ),
        (["checkpoints.checkpoints_path=/proc"], r"/proc/mine: checkpoints cannot be written here"),
    ],
)
def test_what_would_fail_hours_later_is_said_before_the_run_begins(
    overrides: list[str], expected: str, prepare: Prepare, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=expected):
        prepare("mine", *overrides)
    assert not (tmp_path / "runs").exists(), "nothing is left of a run that never began"
    assert prepare("mine").state == "new"
    with pytest.raises(UserError, match=expected):
        prepare("mine", *overrides)
    assert (tmp_path / "runs" / "mine" / "recipe.yaml").is_file()


def test_what_a_launch_that_is_refused_has_not_made_stays(prepare: Prepare, tmp_path: Path) -> None:
    elsewhere = "checkpoints.checkpoints_path=/proc"
    mine = tmp_path / "runs" / "mine"
    mine.mkdir(parents=True)
    for name in (None, "notes.txt"):
        if name is not None:
            (mine / name).touch()
        with pytest.raises(UserError, match="cannot be written here"):
            prepare("mine", elsewhere)
        with pytest.raises(UserError, match="cannot be written here"):
            prepare("other", elsewhere)
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]
        assert name is None or (mine / name).is_file()


def test_a_tokenizer_that_cannot_be_exported_is_said_before_the_run_begins(
    prepare: Prepare, small_mapping: dict[str, Any], tmp_path: Path
) -> None:
    corpus = Path(small_mapping["corpus"]["path"])
    for source in small_mapping["corpus"]["sources"]:
        for stage in small_mapping["data_stages"]:
            names = stage["data"]["dataset"]["dataset_folder"]
            stage["data"]["dataset"]["dataset_folder"] = [
                str(corpus / name) if name == source["name"] else name for name in names
            ]
    del small_mapping["corpus"], small_mapping["tokenizer"]
    file = write_recipe(tmp_path / "small.yaml", small_mapping)
    with pytest.raises(UserError, match=r"tokenizer: expected tokenizer_name_or_path"):
        prepare("mine", EXPORT, file=file)
    assert not (tmp_path / "runs").exists()
    assert prepare("mine", file=file).state == "new"


def test_a_folder_in_the_place_of_the_export_is_said_before_the_run_begins(prepare: Prepare, tmp_path: Path) -> None:
    prepare("mine")
    foreign = tmp_path / "runs" / "mine" / "export"
    foreign.mkdir()
    assert prepare("mine", EXPORT).state == "resumed", "an empty one is none"
    (foreign / "notes").touch()
    with pytest.raises(UserError, match="export: is not empty and was not written by this command"):
        prepare("mine", EXPORT)


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "logs"])
def test_what_lies_in_the_place_of_a_runs_records_is_said_before_it_goes_on(
    name: str, prepare: Prepare, tmp_path: Path
) -> None:
    prepare("mine")
    place = tmp_path / "runs" / "mine" / name
    if name == "metrics.jsonl":
        place.mkdir()
    else:
        place.touch()
    with pytest.raises(UserError, match=f"mine/{name}: expected a .*; move it away"):
        prepare("mine")
    assert not (tmp_path / "runs" / "mine" / HOLDER_FILE).exists()


def test_checkpoints_whose_recipe_is_gone_are_not_overwritten(prepare: Prepare, data: str) -> None:
    folder = prepare("mine").folder
    save(folder, 8, data)
    assert prepare("mine").step == 8
    folder.recipe_file.unlink()
    with pytest.raises(
        UserError, match=r"mine/checkpoints: there are checkpoints \(the newest of step 8\), and no runs"
    ):
        prepare("mine")
    assert not folder.exists() and folder.steps() == [8]


def test_checkpoints_of_another_run_elsewhere_are_not_overwritten(prepare: Prepare, data: str, tmp_path: Path) -> None:
    elsewhere = f"checkpoints.checkpoints_path={tmp_path / 'nvme'}"
    first = prepare(None, elsewhere)
    assert (first.folder.name, first.folder.checkpoints) == ("small-1", tmp_path / "nvme" / "small-1")
    save(first.folder, 8, data)
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(
        UserError, match=r"nvme/small-1: there are checkpoints .* move them away, or choose another --run"
    ):
        prepare("small-1", elsewhere)
    assert prepare(None, elsewhere).folder.name == "small-2"


def test_a_checkpoint_that_was_renamed_or_is_of_other_data_is_not_gone_on_from(prepare: Prepare, data: str) -> None:
    folder = prepare("mine").folder
    save(folder, 4, data, name="5")
    with pytest.raises(
        UserError, match=r"no checkpoint can be used \(step 5: manifest.json: the state after step 4, c"
    ):
        prepare("mine")
    save(folder, 3, data)
    assert prepare("mine").step == 3
    save(folder, 6, "f" * 64)
    with pytest.raises(UserError, match=r"checkpoints/6: it was trained on other data: fingerprint ffffffffffff, not"):
        prepare("mine")
    with pytest.raises(UserError, match="other data"):
        require_data(folder, 6, lambda step: data)


def test_checkpoints_that_the_recipe_no_longer_looks_for_are_not_forgotten(
    prepare: Prepare, data: str, tmp_path: Path
) -> None:
    folder = prepare("mine").folder
    save(folder, 8, data)
    elsewhere = f"checkpoints.checkpoints_path={tmp_path / 'nvme'}"
    with pytest.raises(UserError, match=r"checkpoints_path: null → '.*: its checkpoints are in runs/mine/checkpoints;"):
        prepare("mine", elsewhere)
    assert prepare(None, elsewhere).folder.name == "small-1"
    folder.checkpoints.rename(tmp_path / "nvme" / "mine")
    assert prepare("mine", elsewhere).step == 8


def test_a_run_that_has_no_checkpoint_yet_may_become_another(prepare: Prepare, data: str) -> None:
    first = prepare("mine")
    again = prepare("mine", "tokens.global_batch_size=48", "general.seed=9", "tokens.train_steps=50")
    assert (again.state, again.step) == ("resumed", 0)
    assert again.changes == (
        "after step 0: general.seed: 3 → 9",
        "after step 0: tokens.global_batch_size: 24 → 48",
        "after step 0: tokens.train_steps: 40 → 50",
    )
    assert first.folder.header().changes == again.changes
    assert load_recipe(str(first.folder.recipe_file)).recipe == again.recipe
    assert prepare("mine").changes[0] == "after step 0: general.seed: 9 → 3"
    # Nobody named it: then another experiment is another run.
    assert prepare(None, "general.seed=9").folder.name == "small-1"
    save(first.folder, 8, data)
    with pytest.raises(UserError, match=r"would change steps already taken: general\.seed: 3 → 9"):
        prepare("mine", "general.seed=9")


JUNK = {"binary": b"\x80\xff\x00", "empty": b"", "a list": b"[1]", "a string": b'"x"', "a bomb": b"[" * 100_000}


def damage(path: Path, kind: str) -> None:
    if path.exists():
        path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a dead link":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(JUNK[kind])


@pytest.mark.parametrize("kind", [*JUNK, "a folder", "a dead link"])
@pytest.mark.parametrize("name", ["completed", "recipe.yaml", HOLDER_FILE])
def test_a_damaged_file_is_named_by_its_own_run_and_in_no_other_runs_way(
    name: str, kind: str, prepare: Prepare, tmp_path: Path
) -> None:
    folder = prepare("small-4").folder
    damage(folder.path / name, kind)
    if (name, kind) == (HOLDER_FILE, "a dead link"):
        assert holder_of(folder.path) is None
        return
    with pytest.raises(UserError, match=rf"runs/small-4/{name}: "):
        prepare("small-4")
    assert prepare().folder.name == "small-5"


def test_what_is_no_run_is_in_no_runs_way(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "small-1").symlink_to("nowhere")
    (tmp_path / "runs" / "small-2").write_text("a file")
    (tmp_path / "runs" / f"small-{'9' * 100}").mkdir()
    assert prepare().folder.name == "small-3"
    for name in ("small-1", "small-2"):
        with pytest.raises(UserError, match=rf"runs/{name}: is not a folder"):
            prepare(name)


def test_a_checkpoint_that_another_run_has_trained_is_refused_by_its_recipe(prepare: Prepare, data: str) -> None:
    folder, other = prepare("mine").folder, prepare("other", "general.seed=7").folder
    for run, step in ((folder, 4), (other, 5)):
        save(run, step, data)
        shutil.copy(run.recipe_file, run.checkpoints / str(step))
    assert prepare("mine").step == 4
    shutil.copytree(other.checkpoints / "5", folder.checkpoints / "5")
    with pytest.raises(UserError, match=r"checkpoints/5: a checkpoint of another run, .*general\.seed: 7 → 3; move"):
        prepare("mine")


def test_text_that_has_changed_is_said_before_the_first_step_however_ranks_are_started(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path)
    file = write_recipe(tmp_path / "small.yaml", small_recipe(tmp_path))
    recipe = load_recipe(str(file)).recipe
    tokenize(recipe, "small", workers=1)
    assert prepare("mine", "tokens.train_steps=400", file=file).notes[0].startswith("numbers: its ")
    with (tmp_path / "text" / "words.jsonl").open("a") as words:
        words.write('{"text": "one more"}\n')
    changed = r"^words: to be tokenized again: its files have changed since \(1 file of .* then, 1 file of .* now\)"
    with pytest.raises(UserError, match=rf"{changed} \(and 1 source more\); run `nanotron-recipes tokenize"):
        prepare("mine", file=file)
    monkeypatch.setattr(CorpusSource, "is_remote", True)
    assert re.search(f"{changed}; next: `tokenize`$", prepare("mine", file=file).notes[0])
    (tmp_path / "text" / "words.jsonl").unlink()
    assert prepare("mine", file=file).notes[0].endswith("; the shards made before are used")


LONGER = 4
"""Sequences of the branch below, in the parent's."""


@pytest.fixture
def parent(prepare: Prepare, small_mapping: dict[str, Any], tmp_path: Path) -> Path:
    """A checkpoint after step 8 of a run that read `words` alone."""
    small_mapping["data_stages"] = [stage_of("first", 1, "words")]
    small_mapping["tokens"]["contiguous_length"] = LONGER * small_mapping["tokens"]["sequence_length"]
    folder = prepare("short", file=write_recipe(tmp_path / "short.yaml", small_mapping)).folder
    save(folder, 8, folder.header().data)
    shutil.copy(folder.recipe_file, folder.checkpoints / "8")
    return folder.checkpoints / "8"


def stage_of(name: str, first: int, *sources: str, **keys: int) -> dict[str, Any]:
    return {
        "name": name,
        "start_training_step": first,
        "data": {"seed": 5, "dataset": {"dataset_folder": [*sources]}},
        **keys,
    }


def test_a_branch_with_longer_sequences_goes_on_in_each_source_where_its_parent_stopped(
    prepare: Prepare, parent: Path, small_mapping: dict[str, Any], tmp_path: Path
) -> None:
    """A source that the parent never read may come with the longer stage."""
    length = LONGER * small_mapping["tokens"]["sequence_length"]
    small_mapping["data_stages"].append(stage_of("longer", 9, "words", "numbers", sequence_length=length))
    small_mapping["checkpoints"]["resume_checkpoint_path"] = str(parent)
    file = write_recipe(tmp_path / "longer.yaml", small_mapping)
    branch = prepare("longer", "model.model_config.rope_theta=2e6", file=file)
    assert (branch.step, branch.notes) == (8, ("after step 8: model.model_config.rope_theta: 10000.0 → 2000000.0",))
    before = DataPlan.from_recipe(load_recipe(str(parent / "recipe.yaml")).recipe)
    after = DataPlan.from_recipe(branch.recipe)
    (words,) = before.sources
    read = [block for step in range(1, 9) for block in before.planned(step).blocks.ravel().tolist()]
    size, step = before.sources[words].blocks_per_epoch, 9
    while len(read) < size:
        planned = after.planned(step)
        read += planned.blocks[planned.numbers == 0].ravel().tolist()
        step += 1
    counts = np.bincount(read, minlength=size)
    assert step > 10 and len(read) < 2 * size
    assert counts.min() == 1 and counts.max() <= 2, "an epoch, and what the last step has of the next one"


@pytest.mark.parametrize(
    ("changes", "said", "again"),
    [
        (
            {"data_stages": [stage_of("longer", 1, "words", sequence_length=128)]},
            r"data_stages\.0\.sequence_length: null → 128; keep the parent's tokens and stages, and give another "
            r"mixture or data_stages\[\]\.sequence_length to a stage behind them, or begin at step 1 with",
            "words",
        ),
        (
            {"tokens.sequence_length": 128},
            r"tokens\.sequence_length: 64 → 128; keep the parent's tokens and stages",
            "words",
        ),
        ({"data_stages": [stage_of("first", 1, "numbers")]}, r"taken: .*data fingerprint: ", None),
        (
            {"tokens.contiguous_length": None},
            r"tokens\.contiguous_length: 256 → 64; with tokens\.contiguous_length: 256 it goes on, and longer",
            "words",
        ),
    ],
)
def test_a_branch_that_would_read_otherwise_up_to_its_parents_step_is_told_how_it_can(
    changes: dict[str, Any],
    said: str,
    again: str | None,
    prepare: Prepare,
    parent: Path,
    small_mapping: dict[str, Any],
    tmp_path: Path,
) -> None:
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (small_mapping[section] if section else small_mapping)[name] = value
    small_mapping["checkpoints"]["resume_checkpoint_path"] = str(parent)
    file = write_recipe(tmp_path / "other.yaml", small_mapping)
    with pytest.raises(UserError, match=said):
        prepare("other", file=file)
    anew = prepare("anew", "checkpoints.load_lr_scheduler=false", file=file)
    note = "checkpoints.load_lr_scheduler: false: begins at step 1, and reads from the beginning what its parent read"
    assert anew.notes == ((f"{note}: {again}",) if again else ()), "the sources that both read"
