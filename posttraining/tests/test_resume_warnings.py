"""After a resume and a save nothing is said that is not so; what is wrong still is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import overrides
from test_sft import keys
from transformers.utils import logging

from posttraining import sft, training
from posttraining.errors import StageFailed
from posttraining.resume_warnings import harmless_left_out

MISSING = "There were missing keys in the checkpoint model loaded: [{}]."
HEAD, OTHER = "'lm_head.weight'", "'lm_head.weight', 'model.norm.weight'"
DIFFERS = (
    "Warning: The following arguments do not match the ones in the `trainer_state.json` within the checkpoint "
    "directory: \n\tsave_steps: 0.25 (from args) != 30 (from trainer_state.json)"
)

ORDER = "mtime may not be reliable on this filesystem, falling back to numerical ordering"


@pytest.mark.parametrize(
    ("logger", "message", "tied", "shown"),
    [
        ("trainer", MISSING.format(HEAD), True, False),
        ("trainer", MISSING.format(HEAD), False, True),
        ("trainer", MISSING.format(OTHER), True, True),
        ("trainer_utils", DIFFERS, True, False),
        ("trainer_utils", f"{DIFFERS}\n\tper_device_train_batch_size: 8 (from args) != 4 (from …)", True, True),
        ("trainer_utils", DIFFERS.replace("0.25", "20"), True, True),
        ("trainer_utils", ORDER, True, False),
        ("trainer_utils", ORDER.replace("falling", "not falling"), True, True),
    ],
)
def test_only_what_is_known_to_be_harmless_is_left_out(logger: str, message: str, tied: bool, shown: bool) -> None:
    found: list[str] = []
    trainer = logging.get_logger(f"transformers.{logger}")
    record = trainer.makeRecord(trainer.name, 30, "file", 1, message, (), None)
    with harmless_left_out(tied=tied):
        found += [message] if trainer.filter(record) else []
    assert found == ([message] if shown else [])
    assert trainer.filter(record), "after the block all is shown"


def test_checkpoints_that_follow_each_other_at_once_are_no_warning(base: Path, tmp_path: Path) -> None:
    words = overrides(keys(base, tmp_path, save_steps=1, save_total_limit=1))
    command = [sys.executable, "-m", "posttraining", "sft", "tiny", *(word for one in words for word in ("--set", one))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "mtime" not in done.stderr, done.stderr


def test_a_resume_of_the_tiny_recipe_is_quiet(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = overrides(keys(base, tmp_path, max_steps=4, save_steps=0.5))

    def ends(*_: object) -> None:
        raise StageFailed("ends before it is published")

    with monkeypatch.context() as patch:
        patch.setattr(training, "finish", ends)
        with pytest.raises(StageFailed):
            sft.run("tiny", words)
    command = [sys.executable, "-m", "posttraining", "sft", "tiny", *(word for one in words for word in ("--set", one))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "sft: goes on from step 4" in done.stdout
    assert not any(word in done.stderr for word in ("missing keys", "do not match", "Warning"))
