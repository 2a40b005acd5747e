"""What stages need on several GPUs: accelerate's configs, the sbatch template, and several processes at one stage."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import chat_rows, overrides, write_rows
from test_prefer import pairs
from tiny_model import write_chat

from posttraining import lineage
from posttraining.compare import CSV, PLOT
from posttraining.settings import RECIPES

FOLDER = RECIPES.parent


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_accelerate_reads_its_configs(name: str) -> None:
    config = load_config_from_file(str(FOLDER / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == 8
    assert config.distributed_type.value == ("FSDP" if name == "fsdp2" else "DEEPSPEED")


def test_the_sbatch_template_is_sound() -> None:
    template = FOLDER / "slurm" / "stage.sbatch"
    subprocess.run(["bash", "-n", template], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", template], check=True)
    done = subprocess.run(["bash", template], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch --nodes=N")


def two_processes(command: str, keys: dict[str, Any]) -> str:
    """What `posttraining command tiny` says when two processes run it, which end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    words += ["-m", "posttraining", command, "tiny"]
    words += [word for text in overrides(keys) for word in ("--set", text)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_train_one_model(base: Path, tmp_path: Path) -> None:
    keys = {
        "model": str(base),
        "output_dir": str(tmp_path / "out"),
        "data": {"path": str(write_rows(tmp_path / "rows.jsonl", chat_rows(16)))},
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "logging_steps": 1,
    }
    said = two_processes("sft", keys)
    assert said.count("sft: 4 steps") == 1, "16 rows, four a step; one process speaks"
    assert (tmp_path / "out" / "early" / "model.safetensors").is_file()
    assert lineage.matches_weights(tmp_path / "out")
    assert list(tmp_path.glob(".*")) == []


def test_two_processes_compare_losses_on_the_same_pairs(tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "pairs.jsonl", pairs(8)))
    keys = {
        "model": str(write_chat(tmp_path / "chat")),
        "output_dir": str(tmp_path / "out"),
        "data": {"path": file, "held_out_path": file},
        "runs": {"zero": {"loss_type": ["apo_zero"]}, "dpo": {"loss_type": ["sigmoid"]}},
        "seeds": [1],
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
    }
    said = two_processes("compare", {**keys, "runs.apo_zero": None, "runs.apo_down": None})
    assert said.count("prefer: 2 steps") == 2, "8 pairs, four a step; one process speaks"
    assert said.count("next: ") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"zero-1", "dpo-1", CSV, PLOT}
    assert not list(tmp_path.glob(".*")), "the work folder is gone"
