"""One node of a Slurm job: `python -m launch.cluster.node FOLDER --node-rank N …`, started by srun on every node.

It stages what this node reads, starts the node's ranks, passes signals on to them, and notes how they ended.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cluster.agent import LAUNCHER, REPORT, TERMINATED, USER_ERROR
from launch.cluster.attempts import NodeEnd, write_node_end
from launch.cluster.forwarder import Forwarder
from launch.cluster.local import Meeting, rank_environment, torchrun_arguments
from launch.cluster.snapshot import job_recipe
from launch.cluster.submit import ranks_on_each_node
from launch.cluster.threads import threads_per_rank
from launch.train.arguments import Parser, step_number
from launch.train.run_lock import job_launch_id
from launch.train.streams import describe, say
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import LoadedRecipe, load_recipe
from nanotron_recipes.numbers import short_number

if TYPE_CHECKING:
    from data.staging import Staging


@dataclass(frozen=True)
class _Report:
    """What `launch.cluster.agent` writes about the end of the ranks."""

    code: int
    message: str
    failed_at: float | None
    is_by_signal: bool

    @classmethod
    def read(cls, file: Path) -> "_Report":
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls(1, "the process that started its ranks was killed", None, True)


def main(words: Sequence[str]) -> int:
    """Returns the exit code of the node's task: 0, 2 for a user's mistake, 1 for any other failure."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as the job script has it already; what is started below keeps it
    try:
        arguments = _parse(words)
    except UserError as error:
        say(f"error: {error}", error=True)
        return USER_ERROR
    run = arguments.folder.parent.parent
    try:
        loaded = load_recipe(str(job_recipe(arguments.folder)))
        code, end = _train(run, loaded, arguments)
    except UserError as error:
        message = describe(error)
        say(f"error: {message}", error=True)
        code, end = USER_ERROR, NodeEnd(arguments.node_name, "mistake", message, None, False)
    except (OSError, RuntimeError) as error:  # a disk or the store gave up, which another start may not meet
        message = describe(error)
        say(f"error: {message}", error=True)
        code, end = 1, NodeEnd(arguments.node_name, "crashed", message, time.time(), False)
    write_node_end(run, arguments.job_id, arguments.restart, end)
    return code


def _parse(words: Sequence[str]) -> Namespace:
    parser = Parser(prog="launch.cluster.node", description="Train as one node of a Slurm job.")
    parser.add_argument("folder", type=Path, help="of the submission: runs/<name>/jobs/<number>")
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--num-nodes", type=int, required=True)
    parser.add_argument("--node-name", default=socket.gethostname())
    parser.add_argument("--main-address", required=True, help="of the first node")
    parser.add_argument("--main-port", type=int, required=True)
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--restart", type=int, required=True)
    parser.add_argument("--stop-after", type=step_number)
    return parser.parse_args(words)


def _train(run: Path, loaded: LoadedRecipe, arguments: Namespace) -> tuple[int, NodeEnd]:
    recipe, name = loaded.recipe, arguments.node_name
    ranks, on_cpu = ranks_on_each_node(recipe, arguments.num_nodes), recipe.slurm.gpus_per_node == 0
    if not on_cpu:
        _check_gpus(recipe.slurm.gpus_per_node, ranks)
    _stage(loaded, arguments)
    launch_id = job_launch_id(arguments.job_id, arguments.restart)
    words = [str(job_recipe(arguments.folder)), "--run", run.name, "--job-launch", launch_id, "--node-name", name]
    words += [] if arguments.stop_after is None else ["--stop-after", str(arguments.stop_after)]
    meeting = Meeting(arguments.node_rank, arguments.num_nodes, arguments.main_address, arguments.main_port, name)
    grid = torchrun_arguments("launch.train", ["--", *words], ranks, run / "logs" / name, launch_id, meeting)
    threads = threads_per_rank(recipe, ranks, on_cpu=on_cpu)
    environment = rank_environment(os.environ, ranks, threads, recipe.general.deterministic, on_cpu=on_cpu)
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else every connection to a host without DNS is a warning
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "end.json"
        agent = [sys.executable, "-P", "-m", "launch.cluster.agent", f"{LAUNCHER}{os.getpid()}", f"{REPORT}{report}"]
        ranks_process = subprocess.Popen([*agent, *grid], env=environment)  # before SIGUSR1 is listened for
        with Forwarder() as forwarder:
            code = forwarder.wait([ranks_process])
        return code, _describe_end(name, code, _Report.read(report))


def _check_gpus(gpus_per_node: int, num_ranks: int) -> None:
    """Raise RuntimeError where this node lacks a GPU for one of its ranks: it has lost one, or its driver, and the job
    may go on without it. Raise UserError where torch was built for none, as it is on every node."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        raise UserError(
            f"slurm.gpus_per_node: {gpus_per_node}: torch {torch.__version__} was built for CPUs; expected a torch for "
            "GPUs in the environment of the job, or 0 for ranks that are to be on the CPUs"
        )
    found = torch.cuda.device_count()
    if found < num_ranks:
        raise RuntimeError(f"{found} GPUs can be used here; expected {num_ranks}, one for each rank")


def _stage(loaded: LoadedRecipe, arguments: Namespace) -> None:
    """Copy to this node's disk what it has to read: from nodes that have it, and else from where it comes from."""
    from data.staging import plan_staging, stage
    from data.transfer import Watch

    watch = Watch(note=lambda line: say(f"note: {line}"))
    staging = plan_staging(loaded.recipe, watch)
    if not staging.sources:
        return
    if arguments.num_nodes > 1:
        _ask_neighbours(staging, arguments)
        staging = plan_staging(loaded.recipe, watch)
    if staging.bytes_to_stage:
        say(f"staging {short_number(staging.bytes_to_stage)} bytes")
        stage(loaded.recipe, staging, watch)


def _ask_neighbours(staging: "Staging", arguments: Namespace) -> None:
    from launch.cluster.neighbours import fetch_from_neighbours
    from parallel.together import FailedTogether

    port = arguments.main_port + 1  # beside that of the ranks
    meeting = Meeting(arguments.node_rank, arguments.num_nodes, arguments.main_address, port, arguments.node_name)
    try:
        files = fetch_from_neighbours(staging, meeting)
    except (FailedTogether, RuntimeError) as error:
        say(f"note: nothing could be had from other nodes: {describe(error)}")
        return
    if files:
        say(f"{files} files came from other nodes of the job")


def _describe_end(name: str, code: int, report: _Report) -> NodeEnd:
    if code == 0:
        return NodeEnd(name, "ended", "", None, False)
    if report.code == USER_ERROR:
        return NodeEnd(name, "mistake", report.message, None, False)
    by_slurm = report.code == TERMINATED  # because of what happened on another node
    return NodeEnd(name, "crashed", report.message, None if by_slurm else report.failed_at, report.is_by_signal)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
