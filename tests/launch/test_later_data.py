"""What only later stages read is told by its fingerprint too: it is shown and noted, or makes another run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data.plan import DataPlan
from data.tokenization import tokenize
from launch.cli.main import main
from launch.cli.prepare_data import refuse_other_text
from launch.train.prepare import PreparedRun, RunRequest, fits_unfinished_run, prepare_run
from launch.train.run_folder import RunFolder
from nanotron_recipes.loading import load_recipe
from parallel.checkpoint_files import Manifest, write_manifest

Prepare = Callable[..., PreparedRun]
OTHER_SECOND_STAGE = "data_stages.1.data.dataset.dataset_folder=[numbers, words]"


@pytest.fixture
def prepare(small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Prepare a run of the small recipe in `tmp_path`, and give it back."""
    monkeypatch.chdir(tmp_path)

    def call(run: str | None, *overrides: str) -> PreparedRun:
        prepared = prepare_run(RunRequest(load_recipe(str(small_file), overrides), run))
        prepared.lock.release()
        return prepared

    return call


def save_in_first_stage(folder: RunFolder, small_file: Path) -> None:
    plan = DataPlan.from_recipe(load_recipe(str(small_file)).recipe)
    write_manifest(folder.checkpoints / "8", Manifest(8, plan.fingerprint_through(8), {}, ()))


def test_other_data_in_a_later_stage_is_shown_and_noted(prepare: Prepare, small_file: Path) -> None:
    first = prepare("mine")
    save_in_first_stage(first.folder, small_file)
    before = first.folder.header().data
    again = prepare("mine", OTHER_SECOND_STAGE)
    after = again.folder.header().data
    assert (again.state, again.step) == ("resumed", 8) and before != after
    assert again.changes == (f"after step 8: data fingerprint: {before[:12]} → {after[:12]}",)
    assert again.folder.header().changes == again.changes
    assert prepare("mine", OTHER_SECOND_STAGE).changes == ()


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_run_that_nobody_named_does_not_become_one_of_other_later_data(
    is_saved: bool, prepare: Prepare, small_file: Path
) -> None:
    first = prepare(None)
    if is_saved:
        save_in_first_stage(first.folder, small_file)
    before = first.folder.recipe_file.read_text()
    assert prepare(None, OTHER_SECOND_STAGE).folder.name == "small-2"
    assert first.folder.recipe_file.read_text() == before
    assert prepare(None, "parallelism.pp=2").folder.name == "small-1"


def test_data_that_has_moved_is_the_same(prepare: Prepare, small_file: Path, tmp_path: Path) -> None:
    first = prepare(None)
    save_in_first_stage(first.folder, small_file)
    shutil.copytree(small_file.parent / "corpus", tmp_path / "moved")
    again = prepare(None, f"corpus.path={tmp_path / 'moved'}")
    assert (again.folder.name, again.step, again.changes) == ("small-1", 8, ())


@pytest.mark.parametrize(
    ("override", "fits"),
    [
        (OTHER_SECOND_STAGE, False),
        ("corpus.path=elsewhere", False),
        ("parallelism.pp=2", True),
        ("data_stages.1.data.dataset.dataset_folder=['${SHARDS_OF_A_NODE}', numbers]", True),
    ],
)
def test_where_no_shard_is_seen_other_folders_are_other_data(
    override: str, fits: bool, prepare: Prepare, small_file: Path
) -> None:
    """A variable that only a node fills may stand for the same folder."""
    folder = prepare(None).folder
    assert fits_unfinished_run(folder, load_recipe(str(small_file), [override]).recipe, None) is fits


def test_text_that_has_changed_is_not_tokenized_over_what_a_named_run_has_read(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("text", "corpus"):
        shutil.copytree(small_folder / name, tmp_path / "work" / name)
    monkeypatch.chdir(tmp_path / "work")
    text = (small_folder / "small.yaml").read_text().replace(str(small_folder), str(tmp_path / "work"))
    Path("small.yaml").write_text(text)
    recipe = load_recipe("small.yaml").recipe
    tokenize(recipe, "small")  # the files are written again, and the same
    run = prepare_run(RunRequest(load_recipe("small.yaml"), "mine"))
    run.lock.release()
    refuse_other_text(run.folder, recipe)
    save_in_first_stage(run.folder, Path("small.yaml"))
    refuse_other_text(run.folder, recipe)
    shards = {path: path.read_bytes() for path in Path("corpus").rglob("*.ds")}
    with Path("text/words.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    monkeypatch.setattr("sys.argv", ["nanotron-recipes", "pretrain", "small.yaml", "--run", "mine"])
    with pytest.raises(SystemExit) as ended:
        main()
    (line,) = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: runs/mine: words: to be tokenized again: its files have")
    assert {path: path.read_bytes() for path in Path("corpus").rglob("*.ds")} == shards
