"""A run on this machine: its ranks under torchrun, in the foreground."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from launch.cluster.agent import TERMINATED, USER_ERROR
from nanotron_recipes.errors import UserError
from nanotron_recipes.machine import CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_VARIABLE, usable_cpus

FAILURE_GRACE_SECONDS = 15
"""How long the other ranks may go on after one has failed. A stop that was asked for has no limit: saves take time."""
_REPEATED_DELIVERY_SECONDS = 1.0
_POLL_SECONDS = 0.05


def launch_local(
    arguments: Sequence[str],
    nproc: int,
    logs: Path,
    *,
    threads_per_rank: int | None = None,
    deterministic: bool = False,
    launch_id: str = "launch",
    module: str = "launch.train",
    nodes: Sequence[str] = (),
) -> int:
    """Run `python -m <module> <arguments>` in `nproc` ranks and wait; returns the exit code.

    With `nodes` this machine plays several: each has its share of the ranks under a torchrun of its own, and the ranks
    are told their node's name with `--node-name`. Raises UserError where the ranks cannot be shared out.

    Rank 0 has this terminal; what the others say goes to `logs`/<launch id>_…/attempt_0/<rank>/. `threads_per_rank` is
    what a rank computes with where the user has not set OMP_NUM_THREADS; None leaves it to the libraries. With
    `deterministic` the ranks have what `general.deterministic` needs on CUDA. SIGTERM, SIGHUP and SIGINT reach the
    ranks as SIGTERM: they save and end; a second SIGINT kills them. The exit code is 0 (done, or stopped as asked), 2
    (a user's mistake) or 1. Raises UserError for fewer than one rank.
    """
    if nproc < 1:
        raise UserError(f"{nproc} ranks: at least one is needed")
    if nodes and nproc % len(nodes):
        raise UserError(f"{nproc} ranks: expected a multiple of the {len(nodes)} nodes {', '.join(nodes)}")
    logs.mkdir(parents=True, exist_ok=True)
    if nodes:
        port, share = _free_port(), nproc // len(nodes)
        grids = [
            torchrun_arguments(
                module, [*arguments, "--node-name", name], share, logs / name, launch_id, (number, len(nodes), port)
            )
            for number, name in enumerate(nodes)
        ]
    else:
        grids = [torchrun_arguments(module, arguments, nproc, logs, launch_id)]
    environment = rank_environment(os.environ, nproc, threads_per_rank, deterministic)
    with _Forwarder() as forwarder:
        # A session of its own: Ctrl-C reaches the ranks once, through the forwarder, and never torchrun itself.
        agent = [sys.executable, "-P", "-m", "launch.cluster.agent"]
        return forwarder.wait(
            [subprocess.Popen([*agent, *grid], env=environment, start_new_session=True) for grid in grids]
        )


def torchrun_arguments(
    module: str,
    arguments: Sequence[str],
    nproc: int,
    logs: Path,
    launch_id: str,
    node: tuple[int, int, int] | None = None,
) -> list[str]:
    """The arguments with which torchrun starts `nproc` ranks of `module` on this machine.

    `node` is its number, the number of nodes and the port where they meet, where this machine plays several.
    """
    meeting = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]  # any free port
    if node is not None:
        number, count, port = node
        meeting = [f"--nnodes={count}", f"--node-rank={number}", "--rdzv-backend=static"]
        meeting.append(f"--rdzv-endpoint=127.0.0.1:{port}")
    speaks = 1 if node is None or node[0] == 0 else 0
    redirects = ",".join(f"{rank}:3" for rank in range(speaks, nproc))
    return [
        *meeting,
        f"--nproc-per-node={nproc}",
        "--local-addr=127.0.0.1",
        f"--rdzv-id={launch_id}",
        f"--log-dir={logs}",
        *([f"--redirects={redirects}"] if redirects else []),
        "-m",
        module,
        *arguments,
    ]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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
        self._processes: list[subprocess.Popen[bytes]] = []
        self._asked_at: float | None = None
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

    def wait(self, processes: list[subprocess.Popen[bytes]]) -> int:
        self._processes = processes
        if self._asked_at is not None:
            self._pass_on()
        code = _worst([process.wait() for process in _as_they_end(processes)])
        if self._stopped_before_ranks or (code == TERMINATED and self._asked_at is not None):
            print("Stopped before training began.", file=sys.stderr)
            return 0
        if code == TERMINATED:
            print("Training failed: a rank was ended by SIGTERM before it could listen.", file=sys.stderr)
        return code if code in (0, USER_ERROR) else 1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._pass_on()
        elif number == signal.SIGINT and now - self._asked_at > _REPEATED_DELIVERY_SECONDS:
            self._kill()

    def _pass_on(self) -> None:
        """Ask every rank to stop. Before there are ranks nothing is trained, and torchrun may just end."""
        if not self._processes:
            return
        ranks = self._ranks()
        for rank in ranks:
            _send(rank, signal.SIGTERM)
        if not ranks:
            self._stopped_before_ranks = True
            for process in self._processes:
                process.terminate()

    def _kill(self) -> None:
        print("Ended at once, as asked: what was not saved is lost.", file=sys.stderr)
        for rank in self._ranks():
            _send(rank, signal.SIGKILL)

    def _ranks(self) -> list[psutil.Process]:
        return [rank for process in self._processes for rank in _children(process.pid)]


def _as_they_end(processes: list[subprocess.Popen[bytes]]) -> Iterator[subprocess.Popen[bytes]]:
    """The processes as they end. When one has failed, the others are given a while and then ended as well."""
    left, failed_at = list(processes), math.inf
    while left:
        ended = [process for process in left if process.poll() is not None]
        left = [process for process in left if process not in ended]
        yield from ended
        if any(process.returncode for process in ended):
            failed_at = min(failed_at, time.monotonic())
        if time.monotonic() - failed_at > FAILURE_GRACE_SECONDS:
            failed_at = math.inf
            for process in left:
                process.terminate()
        if left:
            time.sleep(_POLL_SECONDS)


def _worst(codes: Sequence[int]) -> int:
    """The exit code that says most: a user's mistake, then any failure but an end by SIGTERM, then that."""
    return min(codes, key=lambda code: (code != USER_ERROR, code in (0, TERMINATED), code == 0))


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
