"""A rank of a training run: `torchrun --nproc-per-node 2 -m launch.train -- RECIPE --run NAME`.

The launcher (`nanotron-recipes pretrain`) starts this; so may users. The `--` keeps torchrun from reading `--run` as a
shortened `--run-path` of its own (with Python 3.11).
"""

import argparse
import os
import sys


def main() -> int:
    """Parse the arguments, listen for signals, and only then import torch."""
    _leave_working_directory_alone()
    from launch.train.signals import StopRequest

    parser = argparse.ArgumentParser(
        prog="launch.train",
        description="Train as one rank of the world that torchrun describes.",
        epilog="example: torchrun --nproc-per-node 2 -m launch.train -- tiny --run mine",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe or the path of a YAML file")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="change a key; may be repeated")
    parser.add_argument("--run", metavar="NAME", help="the run to start or go on with")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="save and end after this step")
    parser.add_argument("--node-name", metavar="NAME", help="what this node is called; default: its host name")
    parser.add_argument("--launch-id", help=argparse.SUPPRESS)  # given by our launcher, which has prepared the run
    arguments = parser.parse_args()
    arguments.local_rank = os.environ.get("LOCAL_RANK", "0")
    with StopRequest() as stop:
        mistake = _mistake_in(arguments)
        if mistake is not None:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {mistake}", file=sys.stderr)
            return 2
        from launch.train.rank import silence_known_warnings, train

        silence_known_warnings()
        return train(arguments, stop)


def _mistake_in(arguments: argparse.Namespace) -> str | None:
    """What every rank can find wrong by itself, before torch is imported and a run's folder is made."""
    from launch.train.prepare import check_trainable
    from nanotron_recipes.errors import UserError
    from nanotron_recipes.loading import load_recipe
    from nanotron_recipes.topology import resolve_topology

    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return (
            "RANK and WORLD_SIZE are not set; start ranks with: torchrun --nproc-per-node 2 -m launch.train -- RECIPE"
        )
    try:
        loaded = load_recipe(arguments.recipe, arguments.set or [])
        check_trainable(loaded.recipe, loaded.path.name)
        resolve_topology(loaded.recipe, int(os.environ["WORLD_SIZE"]))
    except UserError as error:
        return str(error)
    return None


def _leave_working_directory_alone() -> None:
    """`python -m` puts the working directory first: a user's folder called data or model must not be ours."""
    here = os.getcwd()
    ours = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if here != ours:
        sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]


if __name__ == "__main__":
    sys.exit(main())
