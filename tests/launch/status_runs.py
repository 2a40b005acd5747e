"""Runs as their files are, and what `status` says of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.status.gather import RunStatus, gather
from launch.status.runs import read_run
from launch.status.show import status_view
from launch.train.run_folder import RunFolder, RunHeader
from nanotron_recipes.loading import dump_yaml, load_recipe

ROOT = Path(__file__).parents[2]
RECIPE = load_recipe("tiny", ["tokens.train_steps=200"]).recipe


def record(step: int, speed: float = 1000.0, stage: str = "stable") -> dict[str, Any]:
    tokens = step * 3072
    values = {"step": step, "tokens": tokens, "loss": 3.5 - step / 1000, "lr": 0.01, "grad_norm": 1.0}
    values |= {"tokens_per_second": speed, "step_seconds": 3072 / speed, "data_wait_seconds": 0.0}
    return values | {"memory_peak_bytes": 10**8, "mfu": 0.1, "stage": stage}


def start(step: int, *, launch: str = "launch", time: str = "", **topology: int) -> dict[str, Any]:
    return {"event": "start", "step": step, "launch": launch, "time": time, "topology": topology}


def make_run(runs: Path, name: str, records: list[dict[str, Any]]) -> RunFolder:
    folder = RunFolder.of(runs, name, RECIPE)
    folder.path.mkdir(parents=True)
    folder.write_recipe(dump_yaml(RECIPE), RunHeader("tiny", "0.1.0", "fingerprint"))
    folder.metrics_file.write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


def status_of(folder: RunFolder) -> RunStatus:
    return gather(read_run(folder.path))


def shown(status: RunStatus) -> str:
    console = Console(width=140, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(status_view(status))
    return console.export_text()


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = """
import sys
from launch.cli.main import main
try:
    main()
except SystemExit as end:
    code = end.code
heavy = {"torch", "nanotron", "transformers", "datatrove"}.intersection(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""
    return subprocess.run(
        [sys.executable, "-P", "-c", code, "status", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "140"},
        capture_output=True,
        text=True,
        timeout=60,
    )
