"""A rank of a training run: `torchrun --nproc-per-node 2 -m launch.train -- RECIPE --run NAME`.

The launcher (`nanotron-recipes pretrain`) starts this; so may users. The `--` keeps torchrun from reading `--run` as a
shortened `--run-path` of its own (with Python 3.11).
"""

import os
import signal
import sys
from argparse import Namespace


def main() -> int:
    """Parse the arguments, listen for signals, and only then import torch."""
    _leave_working_directory_alone()
    from launch.train.signals import StopRequest
    from launch.train.streams import describe, open_standard_streams, say
    from nanotron_recipes.errors import UserError
    from nanotron_recipes.machine import CONNECTIONS, CONNECTIONS_VARIABLE

    os.environ.setdefault(CONNECTIONS_VARIABLE, CONNECTIONS)  # CUDA reads it once; our launcher sets it, torchrun not
    open_standard_streams()
    with StopRequest() as stop:
        try:
            arguments = _parse(sys.argv[1:])
            _end_with_parent(arguments)
            _check(arguments)
        except (UserError, OSError) as error:
            if os.environ.get("RANK", "0") == "0":
                say(f"error: {describe(error)}", error=True)
            return 2
        from launch.train.rank import train

        try:
            return train(arguments, stop)
        except KeyboardInterrupt:
            return 130


def _parse(words: list[str]) -> Namespace:
    from argparse import SUPPRESS

    from launch.train.arguments import Parser, step_number

    parser = Parser(
        prog="launch.train",
        description="Train as one rank of the world that torchrun describes.",
        epilog="example: torchrun --nproc-per-node 2 -m launch.train -- tiny --run mine",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe or the path of a YAML file")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="change a key; may be repeated")
    parser.add_argument("--run", metavar="NAME", help="the run to start or go on with")
    parser.add_argument("--stop-after", type=step_number, metavar="STEP", help="save and end after this step")
    parser.add_argument("--node-name", metavar="NAME", help="what this node is called; default: its host name")
    parser.add_argument("--launch-id", help=SUPPRESS)  # given by our launcher, which has prepared the run
    parser.add_argument("--job-launch", help=SUPPRESS)  # given in a Slurm job: which start of which job this is
    return parser.parse_args(words)


def _end_with_parent(arguments: Namespace) -> None:
    """Be killed where the process that our launcher starts ranks with ends, and note it for when the ranks have met:
    from then on it is SIGTERM, for there is something to save."""
    from launch.cluster.parent_death import AGENT_VARIABLE, signal_when_parent_ends

    is_launched = arguments.launch_id or arguments.job_launch
    arguments.parent = int(os.environ.get(AGENT_VARIABLE, os.getppid())) if is_launched else None
    if arguments.parent is not None:
        signal_when_parent_ends(signal.SIGKILL, arguments.parent)


def _check(arguments: Namespace) -> None:
    """Raise UserError for what a rank can find wrong by itself, before torch is imported and a run's folder is made."""
    from launch.train.prepare import check_trainable
    from launch.train.world import World, check_connections
    from nanotron_recipes.loading import load_recipe
    from nanotron_recipes.topology import resolve_topology

    world = World.described_by(os.environ)
    arguments.local_rank = world.local_rank
    loaded = load_recipe(arguments.recipe, arguments.set or [])
    check_trainable(loaded.recipe, loaded.path.name)
    resolve_topology(loaded.recipe, world.size)
    check_connections(loaded.recipe, os.environ)


def _leave_working_directory_alone() -> None:
    """`python -m` puts the working directory first: a user's folder called data or model must not be ours."""
    here = os.getcwd()
    ours = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if here != ours:
        sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]


if __name__ == "__main__":
    sys.exit(main())
