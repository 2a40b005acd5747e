"""A disk that gets full, a real one: what was there stays, the command fails in one line and can be called again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from posttraining.errors import is_full_disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 kB. Where none can be mounted, the test is skipped; where CI is set, it fails."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        said = f"a disk of a size needs root: {mounted.stderr.decode().strip()}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(said)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_what_torch_safetensors_and_python_say_of_a_full_disk_is_known(small_disk: Path) -> None:
    weights = {"weight": torch.zeros(1 << 18)}

    def raised_later() -> None:
        try:
            (small_disk / "a.txt").write_text("a" * 10**6)
        except OSError as error:
            raise ValueError("not written") from error

    for write in (
        lambda: torch.save(weights, small_disk / "a.pt"),
        lambda: save_file(weights, small_disk / "a.safetensors"),
        lambda: (small_disk / "a.txt").write_text("a" * 10**6),
        raised_later,
    ):
        with pytest.raises(Exception) as raised:
            write()
        assert is_full_disk(raised.value)
    assert not is_full_disk(OSError(13, "Permission denied")) and not is_full_disk(RuntimeError("another"))


def test_a_merge_that_fills_its_disk_ends_in_a_line_leaves_nothing_and_works_where_there_is_room(
    small_disk: Path, taught: Path
) -> None:
    target, models = small_disk / "mix", f"[{{model: {taught}}}, {{model: {taught / 'early'}}}]"
    words = [sys.executable, "-P", "-m", "posttraining", "merge", "tiny", "--set", f"models={models}"]
    words += ["--set", "method=soup", "--set", f"output_dir={target}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    said = "failed: no space left on the disk that the stage writes to; make room and start again\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=30m", small_disk], check=True)
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (0, "") and (target / "model.safetensors").is_file()


def test_a_training_that_fills_its_disk_goes_on_where_there_is_room(small_disk: Path, taught: Path) -> None:
    words = [sys.executable, "-P", "-m", "posttraining", "sft", "tiny"]
    for key in (f"model={taught}", f"output_dir={small_disk / 'sft'}", "max_steps=2", "save_steps=1"):
        words += ["--set", key]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    said = "failed: no space left on the disk that the stage writes to; make room and start again\n"
    assert (done.returncode, done.stderr[-len(said) :]) == (1, said) and "Traceback" not in done.stderr
    subprocess.run(["mount", "-o", "remount,size=30m", small_disk], check=True)
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and [path.name for path in small_disk.iterdir()] == ["sft"]
