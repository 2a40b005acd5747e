"""Starts the worker process of `tokenize`, shows how far it is, and makes sure that it never outlives its caller."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data.tokenization_job import Job
from nanotron_recipes.errors import UserError
from nanotron_recipes.files import write_atomic
from nanotron_recipes.machine import usable_cpus

_POLL_SECONDS = 0.1
_START = "import sys; from data.tokenization_worker import main; main(sys.argv[1])"


class TokenizationFailed(RuntimeError):
    """The worker process failed; the message names its log and shows the log's end."""


def run_job(job: Job, console: Console) -> None:
    """Runs the job's incomplete tasks in a process group of their own; TokenizationFailed where one fails,
    UserError where that is for the user to mend."""
    for task in job.tasks:
        job.folder_of(task).mkdir(parents=True, exist_ok=True)
    job.user_error.unlink(missing_ok=True)
    job_file = job.folder / "job.json"
    write_atomic(job_file, job.model_dump_json(indent=2) + "\n")
    log = job.folder / "worker.log"
    with log.open("ab") as output:
        # The pipe to its standard input closes when we die, however we die; -P keeps a data/ folder in the working
        # directory from being taken for ours.
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(job_file)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(job.workers),
            start_new_session=True,
        )
    try:
        _watch(process, job, console)
    finally:
        # Whatever became of the process, none of those that it started stays.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if job.user_error.is_file():
        raise UserError(job.user_error.read_text(encoding="utf-8"))
    if process.returncode != 0:
        raise TokenizationFailed(f"tokenization failed with exit status {process.returncode}; see {log}\n{_tail(log)}")


def _environment(workers: int) -> dict[str, str]:
    """Workers find this package wherever they are started, and share the CPUs instead of each taking all of them."""
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = max(1, usable_cpus() // workers)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
    }


def _watch(process: "subprocess.Popen[bytes]", job: Job, console: Console) -> None:
    columns = (TextColumn("tokenizing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[tokens]}"))
    hidden = not console.is_terminal
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("", total=len(job.tasks), tokens="")
        started, first = time.perf_counter(), _bytes_written(job.folder)
        while process.poll() is None:
            complete = sum(1 for _ in (job.logs / "completions").glob("*"))
            rate = (_bytes_written(job.folder) - first) / (time.perf_counter() - started)
            progress.update(bar, completed=complete, tokens=f"{rate / 1e6:.1f} MB of tokens/s")
            time.sleep(_POLL_SECONDS)


def _bytes_written(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.ds"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # shuffled and removed meanwhile
            continue
    return total


def _tail(log: Path, lines: int = 5) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
