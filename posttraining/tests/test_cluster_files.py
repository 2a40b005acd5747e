"""What stages need on several GPUs: accelerate's configs, the sbatch template, and several processes at one stage."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import chat_rows, overrides, write_rows

from posttraining import lineage
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


def test_two_processes_train_one_model(base: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keys = {
        "model": str(base),
        "output_dir": str(tmp_path / "out"),
        "data": {"path": str(write_rows(tmp_path / "rows.jsonl", chat_rows(16)))},
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "logging_steps": 1,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command += ["-m", "posttraining", "sft", "tiny"]
    command += [word for text in overrides(keys) for word in ("--set", text)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sft: 4 steps") == 1, "16 rows, four a step; one process speaks"
    assert (tmp_path / "out" / "early" / "model.safetensors").is_file()
    assert lineage.matches_weights(tmp_path / "out")
    assert list(tmp_path.glob(".*")) == []
