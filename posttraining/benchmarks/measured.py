"""What a benchmark leaves behind: tables on the terminal, and a dated file without host names or paths."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from posttraining.files import write_whole

FOLDER = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")


@dataclass(frozen=True)
class Section:
    """A table, with what has to be known to read it."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: str = ""


def publish(name: str, heading: str, sections: Sequence[Section], *, write: bool) -> None:
    """Print the tables and the versions; with `write` they also go to benchmarks/results/<today>-<name>.md."""
    facts = "\n".join(f"- {key}: {value}" for key, value in _facts().items())
    text = "\n\n".join([f"# {heading}", facts, *map(_markdown, sections)]) + "\n"
    print(text)
    if write:
        path = FOLDER / "results" / f"{datetime.date.today().isoformat()}-{name}.md"
        write_whole(path, text)
        print(f"written to {path.relative_to(FOLDER.parent.parent)}")


def _facts() -> dict[str, str]:
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "command": "`" + shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]) + "`",
        "commit": _commit(),
        "machine": f"{_cpu()}, {cores} cores",
        "versions": f"python {platform.python_version()}, {packages}",
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=FOLDER.parent, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "recipes", "benchmarks/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return names[0].partition(":")[2].strip() if names else platform.machine()


def _markdown(section: Section) -> str:
    head = [_row(section.columns), _row(["---"] * len(section.columns))]
    table = "\n".join([*head, *map(_row, section.rows)])
    return f"## {section.title}\n\n{table}" + (f"\n\n{section.notes}" if section.notes else "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
