"""Standard benchmarks, run by lighteval in an environment of its own (`make eval-env`)."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanotron_recipes.errors import UserError

LIGHTEVAL = Path(".venv-eval/bin/lighteval")
"""Relative to the clone, where jobs run."""


class BenchmarksFailed(RuntimeError):
    """lighteval is not there, failed, or left no results."""


@dataclass(frozen=True)
class Benchmarks:
    """What lighteval is asked.

    Attributes:
        tasks: as lighteval writes them: `arc:challenge|0,hellaswag|0`.
        max_samples: of each task; None: all.
    """

    tasks: str
    max_samples: int | None = None


def require_lighteval(lighteval: Path = LIGHTEVAL) -> None:
    """Raise UserError where it is not installed."""
    if not lighteval.is_file():
        raise UserError(f"--benchmarks: {lighteval} is missing; expected lighteval there: make eval-env")


def run_benchmarks(
    export: Path, benchmarks: Benchmarks, output: Path, batch_size: int, lighteval: Path = LIGHTEVAL
) -> dict[str, dict[str, float]]:
    """Run them on an exported folder; returns {task: {metric: value}}. What lighteval writes stays in `output`.

    Raises BenchmarksFailed.
    """
    if not lighteval.is_file():
        raise BenchmarksFailed(f"{lighteval} is missing: make eval-env")
    command: list[str | Path] = [lighteval, "accelerate", f"model_name={export},batch_size={batch_size}"]
    command += [benchmarks.tasks, "--output-dir", output]
    command += [] if benchmarks.max_samples is None else ["--max-samples", str(benchmarks.max_samples)]
    before = set(output.rglob("results_*.json"))
    try:
        code = subprocess.run([str(word) for word in command], check=False).returncode
    except OSError as error:
        raise BenchmarksFailed(f"{lighteval} cannot be started: {error.strerror}") from error
    if code:
        raise BenchmarksFailed(f"lighteval ended with exit code {code}")
    written = sorted(set(output.rglob("results_*.json")) - before)
    if not written:
        raise BenchmarksFailed(f"lighteval left no results in {output}")
    return _figures(written[-1])


def _figures(file: Path) -> dict[str, dict[str, float]]:
    try:
        results: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["results"]
        return {
            task: {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
            for task, metrics in results.items()
        }
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BenchmarksFailed(f"{file}: not what lighteval's results look like ({type(error).__name__})") from error
