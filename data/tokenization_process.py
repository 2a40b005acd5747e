"""Starts the worker process of `tokenize`, shows how far it is, and makes sure that it never outlives its caller."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from data.tokenization_job import DISK_IS_FULL, Job
from data.tokenization_progress import Rates, forget_incomplete, state_of
from nanotron_recipes.errors import UserError
from nanotron_recipes.files import write_atomic
from nanotron_recipes.machine import usable_cpus

_POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0
_LINE_SECONDS = 60.0
_START = "import sys; from data.tokenization_worker import main; main(*sys.argv[1:])"


class TokenizationFailed(RuntimeError):
    """The worker process failed; the message names its log and shows the log's end."""


def run_job(job: Job, console: Console, starter: Sequence[str] = ()) -> None:
    """Runs the job's incomplete tasks in a process group of their own; TokenizationFailed where one fails,
    UserError where that is for the user to mend.

    `starter` is put before the worker's command, and starts it on several nodes with two words more: the number of
    the node, from 0 on, and how many there are.
    """
    for task in job.tasks:
        job.folder_of(task).mkdir(parents=True, exist_ok=True)
    job.user_error.unlink(missing_ok=True)
    forget_incomplete(job)
    job_file = job.folder / "job.json"
    write_atomic(job_file, job.model_dump_json(indent=2) + "\n")
    log = job.folder / "worker.log"
    with log.open("ab") as output:
        # The pipe to its standard input closes when we die, however we die; -P keeps a data/ folder in the working
        # directory from being taken for ours.
        process = subprocess.Popen(
            [*starter, sys.executable, "-P", "-c", _START, str(job_file)],
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
    if process.returncode in DISK_IS_FULL:
        raise UserError(f"{job.folder}: {os.strerror(process.returncode)}; make room there and call again")
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
    """Shows how far the job is until it ends: a bar on a terminal, elsewhere a line a minute."""
    columns = (TextColumn("tokenizing"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[said]}"))
    rates = Rates()
    next_look, next_line = 0.0, time.monotonic() + _LINE_SECONDS
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=1.0, said="")
        while process.poll() is None:
            now = time.monotonic()
            if now >= next_look:
                state = state_of(job)
                said = rates.line(now, state)
                progress.update(bar, completed=state.fraction, said=said)
                next_look = now + _LOOK_SECONDS
                if now >= next_line and not console.is_terminal:
                    console.print(f"{state.fraction:.1%}: {said}", soft_wrap=True, highlight=False, markup=False)
                    next_line = now + _LINE_SECONDS
            time.sleep(_POLL_SECONDS)


def _tail(log: Path, lines: int = 5) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
