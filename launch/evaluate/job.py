"""An evaluation that a run has started: `python -m launch.evaluate.job RUN_FOLDER STEP …`, beside the training or as a
Slurm job. What goes wrong here is a line in its log and an event of the run, and nothing else.
"""

import argparse
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.train.arguments import Parser, step_number
from launch.train.streams import describe, say
from nanotron_recipes.errors import UserError

if TYPE_CHECKING:
    from launch.evaluate.offline import Results
    from launch.train.run_folder import RunFolder
    from nanotron_recipes.recipe import Recipe

TERMINATED = 128 + signal.SIGTERM
"""The exit code of an evaluation that was told to end."""
_LOWEST_PRIORITY = 19


def main(words: Sequence[str]) -> int:
    """Returns the exit code: 0; 2 for a wrong call; 1 where the evaluation failed, which is recorded."""
    try:
        arguments = _parse(words)
        if arguments.launcher is not None:
            _stay_in_the_background(arguments.launcher)
        folder, recipe = _run(arguments)
    except (UserError, OSError) as error:
        say(f"error: {describe(error)}", error=True)
        return 2
    from launch.evaluate.checkpoint import record
    from launch.status.evaluation import evaluation_text

    step: int = arguments.step
    try:
        results = _measure(folder, recipe, arguments)
        event = results.event(step)
        for task, reason in results.left_out.items():
            say(f"{task}: left out: {reason}")
        if results.error:
            say(f"error: {results.error}", error=True)
    except Exception as error:  # whatever transformers, lighteval or a disk raises is the evaluation's own affair
        say(f"error: {type(error).__name__}: {describe(error)}", error=True)
        event = {"event": "evaluation", "step": step, "error": describe(error)}
    try:
        record(folder, event)
    except OSError as error:
        say(f"error: {describe(error)}", error=True)
        return 1
    say(evaluation_text(event))
    return 1 if "error" in event else 0


def _parse(words: Sequence[str]) -> Namespace:
    parser = Parser(prog="launch.evaluate.job", description="Evaluate one checkpoint of a run.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("step", type=step_number)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--benchmarks", action="store_true", help="lighteval.tasks of the recipe as well")
    parser.add_argument("--launcher", type=int, help=argparse.SUPPRESS)  # the process that it ends with
    return parser.parse_args(words)


def _stay_in_the_background(launcher: int) -> None:
    from launch.cluster.parent_death import signal_when_parent_ends

    os.nice(_LOWEST_PRIORITY)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # not at once: the exported model is removed before
    signal_when_parent_ends(signal.SIGTERM, launcher)


def _run(arguments: Namespace) -> "tuple[RunFolder, Recipe]":
    from launch.train.run_folder import RunFolder
    from nanotron_recipes.loading import load_recipe

    path: Path = arguments.run
    recipe = load_recipe(str(path / "recipe.yaml")).recipe
    return RunFolder.of(path.parent, path.name, recipe), recipe


def _measure(folder: "RunFolder", recipe: "Recipe", arguments: Namespace) -> "Results":
    from launch.evaluate.benchmarks import Benchmarks
    from launch.evaluate.checkpoint import evaluate_step
    from launch.evaluate.offline import BATCH_SIZE, Request
    from nanotron_recipes.schema.services import Lighteval

    settings = recipe.lighteval or Lighteval()
    request = Request(recipe, tuple(settings.offline_tasks), settings.batch_size or BATCH_SIZE, arguments.device)
    tasks = settings.tasks
    benchmarks = None
    if arguments.benchmarks and tasks is not None and tasks.tasks:
        benchmarks = Benchmarks(tasks.tasks, tasks.max_samples)
    return evaluate_step(folder, arguments.step, request, benchmarks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
