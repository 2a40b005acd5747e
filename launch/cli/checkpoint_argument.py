"""The argument CHECKPOINT: a run or one of its steps, by name or path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from launch.train.run_folder import RunFolder
from model.hf_export import checkpoint_recipe
from nanotron_recipes.errors import UserError, nearest_name, user_error
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe
from parallel.checkpoint_files import read_manifest

CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A run (its name, its folder, or runs/latest; the newest step is meant) or the folder of one step.",
    ),
]
"""The checkpoint of a command."""


@dataclass(frozen=True)
class ChosenCheckpoint:
    """The folder of one step, and the run that it belongs to where that is known."""

    folder: Path
    recipe: Recipe
    step: int | None
    """None for a checkpoint that no training made (an import)."""
    run: RunFolder | None


def choose_checkpoint(argument: str, runs_dir: Path) -> ChosenCheckpoint:
    """Find what the argument means; raises UserError where there is no such run or step, or no checkpoint yet."""
    if not argument:
        raise user_error("expected a run (its name or folder), or the folder of a step", value=argument)
    path = Path(argument) if Path(argument).is_dir() else runs_dir / argument
    if not path.is_dir():
        runs = [entry.name for entry in runs_dir.iterdir()] if runs_dir.is_dir() else []
        expected = f"no such folder, and no such run in {runs_dir}/"
        raise user_error(expected, source=argument, nearest=nearest_name(argument, runs))
    path = real_path(path)
    if _is_run(path):
        return _newest_of(path, argument)
    recipe = checkpoint_recipe(path)
    step = int(path.name) if path.name.isdecimal() else None
    run = _run_of(path, recipe, runs_dir) if step is not None else None
    return ChosenCheckpoint(path, recipe, _trained_step(path) if run is None else step, run)


def refuse_renamed(chosen: ChosenCheckpoint) -> None:
    """Raise UserError for a step of a run that has the name of another one. A damaged one passes: whoever reads it says
    what is wrong."""
    if chosen.run is None:
        return
    try:
        found = read_manifest(chosen.folder).step
    except UserError:
        return
    if found != chosen.step:
        raise UserError(f"{chosen.folder}: the state after step {found}, called {chosen.step}")


def _trained_step(folder: Path) -> int | None:
    """The step of a checkpoint outside of its run, where a folder may have any name. None for an import, and for a
    damaged one: whoever reads it says what is wrong."""
    try:
        return read_manifest(folder).step or None
    except UserError:
        return None


def real_path(path: Path) -> Path:
    """The absolute path without links; where they lead in a circle, as far as they lead (Path.resolve raises there)."""
    return Path(os.path.realpath(path))


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir()


def _newest_of(path: Path, argument: str) -> ChosenCheckpoint:
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{argument}: no recipe.yaml here; expected the folder of a run")
    run = RunFolder.of(path.parent, path.name, load_recipe(str(path / "recipe.yaml")).recipe)
    steps = run.steps()
    if not steps:
        raise UserError(f"{argument}: no checkpoint in {run.checkpoints} yet; expected a run that has saved one")
    folder = run.step_folders(steps[-1])[0]
    return ChosenCheckpoint(folder, checkpoint_recipe(folder), steps[-1], run)


def _run_of(step_folder: Path, recipe: Recipe, runs_dir: Path) -> RunFolder | None:
    """The run of a step: the folder above `checkpoints/`, or the one named like the folder in `checkpoints_path`."""
    inside = step_folder.parent.name == "checkpoints"
    path = step_folder.parent.parent if inside else runs_dir / step_folder.parent.name
    return RunFolder.of(path.parent, path.name, recipe) if _is_run(path) else None
