"""A run on this machine: its ranks under torchrun, in the foreground."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.cluster.agent import LAUNCHER
from launch.cluster.forwarder import FAILURE_GRACE_SECONDS, Forwarder
from nanotron_recipes.errors import UserError
from nanotron_recipes.machine import (
    CONNECTIONS,
    CONNECTIONS_VARIABLE,
    CUBLAS_WORKSPACE,
    CUBLAS_WORKSPACE_VARIABLE,
    GPUS_VARIABLE,
    usable_cpus,
)

_MEETING_SECONDS = 7 * 24 * 3600
"""How long a node waits for the others, which may copy their data for hours. A node that never comes does not keep it
waiting: whoever started the nodes, Slurm or the launcher here, ends them all when one has ended."""


def launch_local(
    arguments: Sequence[str],
    nproc: int,
    logs: Path,
    *,
    threads_per_rank: int | None = None,
    deterministic: bool = False,
    on_cpu: bool = False,
    launch_id: str = "launch",
    module: str = "launch.train",
    nodes: Sequence[str] = (),
) -> int:
    """Run `python -m <module> <arguments>` in `nproc` ranks and wait; returns the exit code.

    With `nodes` this machine plays several: each has its share of the ranks and of the GPUs, under a torchrun of its
    own, and the ranks are told their node's name with `--node-name`. Raises UserError where the ranks cannot be shared
    out.

    Rank 0 has this terminal; what the others say goes to `logs`/<launch id>_…/attempt_0/<rank>/. `threads_per_rank` is
    what a rank computes with where the user has not set OMP_NUM_THREADS; None leaves it to torchrun: one thread each
    where there are several ranks, what the libraries choose for a single one. With `deterministic` the ranks have what
    `general.deterministic` needs on CUDA; with `on_cpu` they see no GPU. SIGTERM, SIGHUP and SIGINT reach the ranks as
    SIGTERM: they save and end; a second SIGINT kills them. The exit code is 0 (done, or stopped as asked), 2 (a user's
    mistake) or 1. Where this process dies, the ranks save and end (see `launch.cluster.parent_death`); therefore it is
    called in the main thread. Raises UserError for fewer than one rank.
    """
    if nproc < 1:
        raise UserError(f"{nproc} ranks: at least one is needed")
    if nodes and nproc % len(nodes):
        raise UserError(f"{nproc} ranks: expected a multiple of the {len(nodes)} nodes {', '.join(nodes)}")
    logs.mkdir(parents=True, exist_ok=True)
    environment = rank_environment(os.environ, nproc, threads_per_rank, deterministic, on_cpu=on_cpu)
    if nodes:
        # The first torchrun has the store where all meet; the others say at length that it ended before them.
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        port, share = _free_port(), nproc // len(nodes)
        grids = [
            (
                torchrun_arguments(
                    module,
                    [*arguments, "--node-name", name],
                    share,
                    logs / name,
                    launch_id,
                    Meeting(number, len(nodes), "127.0.0.1", port, "127.0.0.1"),
                ),
                environment if on_cpu else _with_gpus_of_node(environment, share, number),
            )
            for number, name in enumerate(nodes)
        ]
    else:
        grids = [(torchrun_arguments(module, arguments, nproc, logs, launch_id), environment)]
    with Forwarder() as forwarder:
        # A session of its own: Ctrl-C reaches the ranks once, through the forwarder, and never torchrun itself.
        agent = [sys.executable, "-P", "-m", "launch.cluster.agent", f"{LAUNCHER}{os.getpid()}"]
        return forwarder.wait(
            [subprocess.Popen([*agent, *grid], env=variables, start_new_session=True) for grid, variables in grids]
        )


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of several nodes find each other.

    Attributes:
        number: of this node, from 0 on.
        count: of nodes.
        address: of node 0, with the port that it listens on.
        own_address: under which the other nodes find this one.
    """

    number: int
    count: int
    address: str
    port: int
    own_address: str


def torchrun_arguments(
    module: str,
    arguments: Sequence[str],
    nproc: int,
    logs: Path,
    launch_id: str,
    meeting: Meeting | None = None,
) -> list[str]:
    """The arguments with which torchrun starts `nproc` ranks of `module` on this node; without a `meeting` there is no
    other."""
    if meeting is None:
        how = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    else:
        how = [f"--nnodes={meeting.count}", f"--node-rank={meeting.number}", "--rdzv-backend=static"]
        how += [f"--rdzv-conf=timeout={_MEETING_SECONDS}"]
        how += [f"--rdzv-endpoint={meeting.address}:{meeting.port}", f"--local-addr={meeting.own_address}"]
    speaks = 1 if meeting is None or meeting.number == 0 else 0
    redirects = ",".join(f"{rank}:3" for rank in range(speaks, nproc))
    return [
        *how,
        f"--nproc-per-node={nproc}",
        f"--rdzv-id={launch_id}",
        f"--log-dir={logs}",
        *([f"--redirects={redirects}"] if redirects else []),
        "-m",
        module,
        *arguments,
    ]


def _with_gpus_of_node(environment: Mapping[str, str], share: int, number: int) -> dict[str, str]:
    """`environment`, in which the node with this number sees its own `share` of the GPUs that can be seen: node 0 the
    first ones."""
    visible = environment.get(GPUS_VARIABLE)
    gpus = [str(gpu) for gpu in range(share * (number + 1))] if visible is None else visible.split(",")
    return {**environment, GPUS_VARIABLE: ",".join(gpus[share * number : share * (number + 1)])}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_environment(
    environment: Mapping[str, str],
    nproc: int,
    threads_per_rank: int | None,
    deterministic: bool = False,
    *,
    on_cpu: bool = False,
) -> dict[str, str]:
    """The variables that ranks start with: `environment`, and what is set there wins, but that ranks `on_cpu` see no
    GPU."""
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
        CONNECTIONS_VARIABLE: CONNECTIONS,
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(FAILURE_GRACE_SECONDS),
    }
    ours_first = {
        "PYTHONPATH": repository if not inherited else f"{repository}{os.pathsep}{inherited}",
        # The working directory, where a folder may be called data or model, is not on the path.
        "PYTHONSAFEPATH": "1",
    }
    hidden = {GPUS_VARIABLE: ""} if on_cpu else {}
    return {**defaults, **environment, **hidden, **ours_first}
