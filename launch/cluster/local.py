"""A run on this machine: its ranks under torchrun, in the foreground."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from launch.cluster.agent import LAUNCHER, TERMINATED, USER_ERROR
from launch.train.streams import say
from nanotron_recipes.errors import UserError
from nanotron_recipes.machine import CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_VARIABLE, usable_cpus

FAILURE_GRACE_SECONDS = 15
"""How long the other ranks may go on after one has failed. A stop that was asked for has no limit: saves take time."""
_REPEATED_DELIVERY_SECONDS = 1.0


def launch_local(
    arguments: Sequence[str],
    nproc: int,
    logs: Path,
    *,
    threads_per_rank: int | None = None,
    deterministic: bool = False,
    launch_id: str = "launch",
    module: str = "launch.train",
) -> int:
    """Run `python -m <module> <arguments>` in `nproc` ranks and wait; returns the exit code.

    Rank 0 has this terminal; what the others say goes to `logs`/<launch id>_…/attempt_0/<rank>/. `threads_per_rank` is
    what a rank computes with where the user has not set OMP_NUM_THREADS; None leaves it to the libraries. With
    `deterministic` the ranks have what `general.deterministic` needs on CUDA. SIGTERM, SIGHUP and SIGINT reach the
    ranks as SIGTERM: they save and end; a second SIGINT kills them. The exit code is 0 (done, or stopped as asked), 2
    (a user's mistake) or 1. Where this process dies, the ranks save and end (see `launch.cluster.parent_death`);
    therefore it is called in the main thread. Raises UserError for fewer than one rank.
    """
    if nproc < 1:
        raise UserError(f"{nproc} ranks: at least one is needed")
    logs.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-P",
        "-m",
        "launch.cluster.agent",
        f"{LAUNCHER}{os.getpid()}",
        *torchrun_arguments(module, arguments, nproc, logs, launch_id),
    ]
    environment = rank_environment(os.environ, nproc, threads_per_rank, deterministic)
    with _Forwarder() as forwarder:
        # A session of its own: Ctrl-C reaches the ranks once, through the forwarder, and never torchrun itself.
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        return forwarder.wait(process)


def torchrun_arguments(module: str, arguments: Sequence[str], nproc: int, logs: Path, launch_id: str) -> list[str]:
    """The arguments with which torchrun starts `nproc` ranks of `module` on this machine."""
    redirects = ",".join(f"{rank}:3" for rank in range(1, nproc))
    return [
        "--nnodes=1",
        f"--nproc-per-node={nproc}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",  # any free port
        "--local-addr=127.0.0.1",
        f"--rdzv-id={launch_id}",
        f"--log-dir={logs}",
        *([f"--redirects={redirects}"] if redirects else []),
        "-m",
        module,
        *arguments,
    ]


def rank_environment(
    environment: Mapping[str, str], nproc: int, threads_per_rank: int | None, deterministic: bool = False
) -> dict[str, str]:
    """The variables that ranks start with: `environment`, and what is set there wins."""
    repository = str(Path(__file__).resolve().parents[2])
    inherited = environment.get("PYTHONPATH")
    threads = {} if threads_per_rank is None else {"OMP_NUM_THREADS": str(threads_per_rank)}
    # Threads that spin while they wait take the cores that the other ranks need.
    waiting = {"OMP_WAIT_POLICY": "PASSIVE"} if nproc * (threads_per_rank or 1) > usable_cpus() else {}
    cublas = {CUBLAS_WORKSPACE_VARIABLE: CUBLAS_WORKSPACE} if deterministic else {}
    defaults = {
        **threads,
        **waiting,
        **cublas,
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(FAILURE_GRACE_SECONDS),
    }
    ours_first = {
        "PYTHONPATH": repository if not inherited else f"{repository}{os.pathsep}{inherited}",
        # The working directory, where a folder may be called data or model, is not on the path.
        "PYTHONSAFEPATH": "1",
    }
    return {**defaults, **environment, **ours_first}


class _Forwarder:
    """Passes signals on to the ranks that torchrun started."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._asked_at: float | None = None
        self._asked_by = ""
        self._stopped_before_ranks = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Forwarder":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP on purpose
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        self._process = process
        if self._asked_at is not None:
            self._pass_on()
        code = process.wait()
        if self._stopped_before_ranks or (code == TERMINATED and self._asked_at is not None):
            say("Stopped before training began.", error=True)
            return 0
        if code == TERMINATED:
            say("Training failed: a rank was ended by SIGTERM before it could listen.", error=True)
        elif code < 0:
            say(
                f"Training failed: process {process.pid}, which started the ranks, was ended by {_signal_name(-code)}; "
                "what still runs of them saves and ends.",
                error=True,
            )
        return code if code in (0, USER_ERROR) else 1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._asked_by = signal.Signals(number).name
            self._pass_on()
        elif number == signal.SIGINT and now - self._asked_at > _REPEATED_DELIVERY_SECONDS:
            self._kill()

    def _pass_on(self) -> None:
        """Ask every rank to stop. Before there are ranks nothing is trained, and torchrun may just end."""
        if self._process is None:
            return
        ranks = self._ranks()
        for rank in ranks:
            _send(rank, signal.SIGTERM)
        if ranks:
            at_once = " Ctrl-C again ends at once, without." if self._asked_by == "SIGINT" else ""
            say(f"Stopping ({self._asked_by}): the state after the step at hand is saved.{at_once}")
        else:
            self._stopped_before_ranks = True
            self._process.terminate()

    def _kill(self) -> None:
        say("Ended at once, as asked: what was not saved is lost.", error=True)
        for rank in self._ranks():
            _send(rank, signal.SIGKILL)

    def _ranks(self) -> list[psutil.Process]:
        assert self._process is not None
        try:
            return psutil.Process(self._process.pid).children()
        except psutil.NoSuchProcess:
            return []


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
