"""Which runs there are, and what is known of one before anything of it is read."""

import os
from dataclasses import dataclass
from pathlib import Path

from launch.cluster.snapshot import job_recipe
from launch.cluster.submit import SUBMISSION_FILE, SubmittedJob
from launch.train.run_folder import LATEST, LATEST_EXPORT, RunFolder
from nanotron_recipes.errors import UserError, nearest_name, user_error
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe
from parallel.checkpoint_files import MANIFEST_FILE


@dataclass(frozen=True)
class FoundRun:
    """A run with its recipe: its own, or, before it has begun, that of its newest submission."""

    folder: RunFolder
    recipe: Recipe
    recipe_file: Path
    jobs: list[SubmittedJob]
    """Its submissions to Slurm, the oldest first."""


def run_paths(runs_dir: Path) -> list[Path]:
    """The folders of all runs, by name."""
    if not runs_dir.is_dir():
        return []
    entries = [entry for entry in runs_dir.iterdir() if entry.name not in (LATEST, LATEST_EXPORT)]
    return sorted(entry for entry in entries if _is_run(entry))


def find_run(argument: str, runs_dir: Path) -> FoundRun:
    """The run of that name, folder, or link. Raises UserError with the nearest name where there is none."""
    if not argument:
        raise user_error(f"expected a run: its name in {runs_dir}/, its folder, or a link to it", value=argument)
    path = Path(os.path.realpath(argument if _is_run(Path(argument)) else runs_dir / argument))
    if (path / MANIFEST_FILE).is_file():
        raise UserError(
            f"{argument}: a checkpoint; expected its run: a name in {runs_dir}/, a folder, or a link to one"
        )
    if not _is_run(path):
        names = [entry.name for entry in run_paths(runs_dir)]
        folder = next((each for each in (Path(argument), runs_dir / argument) if each.is_dir()), None)
        what = (
            f"no such run in {runs_dir}/" if folder is None else f"no recipe.yaml in {folder}; expected a run's folder"
        )
        raise user_error(what, source=argument, nearest=nearest_name(argument, names))
    return read_run(short_path(path))


def read_run(path: Path) -> FoundRun:
    """The run in a folder. Raises UserError where its recipe cannot be read."""
    numbers = sorted(
        (entry.parent for entry in (path / "jobs").glob(f"*/{SUBMISSION_FILE}") if entry.parent.name.isdecimal()),
        key=lambda folder: int(folder.name),
    )
    own = path / "recipe.yaml"
    if not own.is_file() and not numbers:
        raise UserError(f"{path}: no recipe.yaml here; expected the folder of a run")
    recipe_file = own if own.is_file() else job_recipe(numbers[-1])
    recipe = load_recipe(str(recipe_file)).recipe
    jobs = [job for folder in numbers if (job := SubmittedJob.read(folder)) is not None]
    return FoundRun(RunFolder.of(path.parent, path.name, recipe), recipe, recipe_file, jobs)


def _is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() or any((path / "jobs").glob(f"*/{SUBMISSION_FILE}"))


def short_path(path: Path) -> Path:
    """A path as it is shown: from the working directory where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
