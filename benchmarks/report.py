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

from rich.console import Console
from rich.table import Table

from nanotron_recipes.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ("nanotron_recipes", "parallel", "model", "data", "launch", "benchmarks/*.py")
PACKAGES = ("torch", "nanotron", "transformers")


@dataclass(frozen=True)
class Section:
    """A table, with what has to be known to read it."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: str = ""


def publish(
    name: str, heading: str, sections: list[Section], *, write: bool, packages: Sequence[str] = PACKAGES
) -> None:
    """Print the tables and the versions of `packages`; with `write` they also go to
    benchmarks/results/<today>-<name>.md."""
    facts = _facts(packages)
    console = Console()
    for section in sections:
        table = Table(*section.columns, title=section.title, caption=section.notes, caption_justify="left")
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
    for key, value in facts.items():
        console.print(f"{key}: {value}", highlight=False)
    if not write:
        return
    parts = [f"# {heading}", "\n".join(f"- {key}: {value}" for key, value in facts.items())]
    parts += [_markdown(section) for section in sections]
    path = RESULTS / f"{datetime.date.today().isoformat()}-{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "\n\n".join(parts) + "\n")
    console.print(f"written to {path.relative_to(ROOT)}", highlight=False)


def _facts(packages: Sequence[str]) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "command": "`" + shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]) + "`",
        "commit": _commit(),
        "machine": f"{_cpu_model()}, {cores} cores",
        "load": "{:.1f} processes wanted to run during the last minute, {:.1f} during the last five".format(
            *os.getloadavg()
        ),
        "versions": ", ".join([f"python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]),
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    code_has_changed = git("status", "--porcelain", "--", *MEASURED)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if code_has_changed else "")


def _cpu_model() -> str:
    """The CPU's name, family and model; virtual machines often hide the first."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    first = cpuinfo.read_text().split("\n\n")[0]
    lines = (line.partition(":") for line in first.splitlines())
    known = {key.strip(): value.strip() for key, _, value in lines}
    widest = [name for name in ("amx_tile", "avx512_bf16", "avx512f", "avx2") if name in known.get("flags", "").split()]
    name = known.get("model name", platform.machine())
    return f"{name} (family {known.get('cpu family', '?')} model {known.get('model', '?')}; {', '.join(widest)})"


def _markdown(section: Section) -> str:
    lines = [f"## {section.title}", "", _row(section.columns), _row(("---",) * len(section.columns))]
    lines += [_row(row) for row in section.rows]
    return "\n".join(lines) + (f"\n\n{section.notes}" if section.notes else "")


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
