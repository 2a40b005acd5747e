"""What every stage that trains does with a short, a diverged or a damaged training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import overrides
from test_sft import Killed, keys
from transformers import TrainerState

from posttraining import lineage, sft, training
from posttraining.errors import StageFailed
from posttraining.files import own_work_folder, publish


def test_fewer_steps_than_logging_steps_end_well(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft.run("tiny", overrides(keys(base, tmp_path, max_steps=1, logging_steps=50)))
    assert "sft: 1 steps, loss " in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_steps_that_fly_by_have_a_line_now_and_then_and_the_last_one(capsys: pytest.CaptureFixture[str]) -> None:
    lines, state = training._Lines("grpo"), TrainerState(max_steps=50)
    lines.on_train_begin(None, state, None)
    for step in range(1, 51):
        state.global_step = step
        lines.on_log(None, state, None, {"eval_loss" if step == 20 else "loss": 1.0})
    said = [line.split()[2] for line in capsys.readouterr().out.splitlines()]
    assert {"1/50", "20/50", "50/50"} <= set(said) and len(said) < 10


# Weights that each step makes a 1e29-fold of what they were are infinite after the second.
DIVERGES: dict[str, Any] = {"max_steps": 5, "learning_rate": 0.1, "warmup_steps": 0, "weight_decay": 1e30}


def test_a_diverged_model_is_not_published(base: Path, tmp_path: Path) -> None:
    words = keys(base, tmp_path, **DIVERGES, logging_steps=50, early_at=0.5)
    with pytest.raises(StageFailed, match=r"the tensor \S+ holds values that are not finite; move \S+\.out\.work away"):
        sft.run("tiny", overrides(words))
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_ends_at_the_first_logged_step_that_shows_it(base: Path, tmp_path: Path) -> None:
    words = keys(base, tmp_path, **DIVERGES, save_steps=5)
    with pytest.raises(StageFailed, match=r"diverged: the gradient of step [23] is not finite"):
        sft.run("tiny", overrides(words))
    assert not (tmp_path / "out").exists()
    assert not any((tmp_path / ".out.work").glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_is_passed_over(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = keys(base, tmp_path, max_steps=6, save_steps=2, save_total_limit=3)

    def ends(*_: object) -> None:
        raise StageFailed("ends before it is published")

    with monkeypatch.context() as patch:
        patch.setattr(training, "finish", ends)
        with pytest.raises(StageFailed):
            sft.run("tiny", overrides(words))
    work = tmp_path / ".out.work"
    for step in (6, 4):
        file = work / f"checkpoint-{step}" / name
        file.write_bytes(file.read_bytes()[:1000])
    sft.run("tiny", overrides(words))
    said = capsys.readouterr().out
    assert f"checkpoint-6/{name}: damaged; tries the checkpoint before" in said
    assert "sft: goes on from step 2" in said


def test_two_processes_do_not_train_into_one_folder(base: Path, tmp_path: Path) -> None:
    words = overrides(keys(base, tmp_path, rows=4000))
    command = [sys.executable, "-m", "posttraining", "sft", "tiny", *(word for one in words for word in ("--set", one))]
    with own_work_folder(tmp_path / "out", {"stage": "another's"}):
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert second.stderr == f"error: {tmp_path / 'out'}: is being written by another process\n"


@pytest.mark.parametrize("strategy", ["steps", "no"])
@pytest.mark.parametrize("place", ["lineage", "publish"])
def test_a_training_that_was_killed_while_it_finished_is_finished_by_the_next_call(
    place: str, strategy: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = overrides(keys(base, tmp_path, max_steps=4, save_steps=2, save_strategy=strategy, early_at=0.5))
    append = lineage.append

    def append_or_die(folder: Path, *arguments: Any, **more: Any) -> None:
        if folder.name == training.EARLY:
            raise Killed
        append(folder, *arguments, **more)

    def publish_or_die(folder: Path, path: Path) -> None:
        if path.name == "out":
            raise Killed
        publish(folder, path)

    with monkeypatch.context() as patch:
        if place == "lineage":
            patch.setattr(lineage, "append", append_or_die)
        else:
            patch.setattr(training, "publish", publish_or_die)
        for _ in range(2):
            with pytest.raises(Killed):
                sft.run("tiny", words)
    assert not (tmp_path / "out").exists()
    sft.run("tiny", words)
    early = tmp_path / "out" / training.EARLY
    stages = lineage.read(early)
    assert stages is not None and stages[-1]["config"]["kept_at_step"] == 2
    assert lineage.matches_weights(early) and not (early / "step.json").exists()
    assert list(tmp_path.glob(".*")) == []
