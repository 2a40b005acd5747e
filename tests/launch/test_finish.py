"""A trained run is complete, whatever becomes of pictures and cards."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_pretraining import TRAIN_STEPS

from data.plan import DataPlan
from launch.cli import finish as finish_command
from launch.cli import pretrain
from launch.evaluate import finish
from launch.train.metrics import MetricsWriter, validation_event
from launch.train.prepare import PreparedRun, RunRequest, prepare_run
from nanotron_recipes.loading import load_recipe
from parallel.checkpoint_files import Manifest, write_manifest


@pytest.fixture
def trained(small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedRun:
    """A run whose last step is saved, as far as its manifest goes."""
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(str(small_file))
    prepared = prepare_run(RunRequest(loaded, "trained"))
    prepared.lock.release()
    data = DataPlan.from_recipe(loaded.recipe).fingerprint
    write_manifest(prepared.folder.checkpoints / str(TRAIN_STEPS), Manifest(TRAIN_STEPS, data, {}, ()))
    return prepared


@pytest.mark.parametrize("damage", ["no records", "a folder", "no picture"])
def test_a_run_without_a_picture_is_complete(
    damage: str, trained: PreparedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "a folder":
        trained.folder.metrics_file.mkdir()
    elif damage == "no picture":
        MetricsWriter(trained.folder.metrics_file).close()
    assert pretrain._finish(trained, Console(soft_wrap=True)) == 0
    assert trained.folder.completed_step() == TRAIN_STEPS
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("the picture of the losses: failed (")
    assert "next:" in captured.out


@pytest.mark.parametrize("saved", [None, 8, TRAIN_STEPS])
def test_what_is_to_be_called_next_can_be_called_whatever_is_saved(
    saved: int | None, trained: PreparedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(trained.folder.checkpoints / str(TRAIN_STEPS))
    if saved is not None:
        write_manifest(trained.folder.checkpoints / str(saved), Manifest(saved, "", {}, ()))
    unsaved = {"save_final_state": False, "export_at_end": False}
    recipe = trained.recipe
    recipe = recipe.model_copy(update={"checkpoints": recipe.checkpoints.model_copy(update=unsaved)})
    assert finish_command.finish(trained.folder, recipe, Console(soft_wrap=True)) == 0
    said = capsys.readouterr().out.splitlines()
    following = "status trained" if saved is None else "export trained OUT --verify"
    assert said[-1].startswith("next:  ") and said[-1].endswith(f"nanotron-recipes {following}")
    told = [line.split(":")[1].strip() for line in said if line.startswith("checkpoint:")]
    assert told == {None: ["none"], 8: ["the newest is of step 8"]}.get(saved, [])


def test_what_fails_after_the_export_is_said_and_the_rest_goes_on(
    trained: PreparedRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise ArithmeticError("out\nof luck")

    recipe = trained.recipe
    monkeypatch.setattr(finish, "export_checkpoint", lambda *arguments, **keywords: None)
    monkeypatch.setattr(finish, "verify_checkpoint", lambda *arguments: 0.0)
    for name in ("Generator", "bigram_baseline", "render_card"):
        monkeypatch.setattr(finish, name, fail)
    writer = MetricsWriter(trained.folder.metrics_file)
    for loss in (6.0, 5.0):  # step 0 twice: the run was begun again with another recipe
        writer.on_event(validation_event(0, {"words": loss}))
    writer.on_event(validation_event(TRAIN_STEPS, {"words": 1.0}))
    writer.close()
    finish.finish_run(trained.folder, recipe, DataPlan.from_recipe(recipe), Console(width=120))
    captured = capsys.readouterr()
    assert [line.partition(": ")[0] for line in captured.err.splitlines()] == [
        "asking the exported model",
        "the bigram model to compare with",
        "the model card of this run (a shorter one is there)",
    ]
    assert "failed (ArithmeticError: out of luck)" in captured.err
    assert "5.0000" in captured.out and "6.0000" not in captured.out
    assert (trained.folder.path.parent / "latest-export").is_symlink()
