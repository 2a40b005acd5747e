"""Which run a launch starts or goes on with, and the links to the newest."""

import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.train.run_folder import LATEST, RunFolder, is_free, seen_paths
from launch.train.run_lock import RunIsTrained, RunLock
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe


@dataclass(frozen=True)
class RunChoice:
    """Which run a launch is about, and what is to be done with it."""

    folder: RunFolder
    """The run."""
    state: Literal["new", "resumed", "complete"]
    """`new`: nothing is there; `resumed`: unfinished, or asked to train longer; `complete`: nothing is left to do."""


Compatible = Callable[[RunFolder], bool]
"""Whether the recipe at hand changes nothing of what the unfinished run in a folder learns, past or later."""


def choose_run(
    runs_dir: Path, recipe_name: str, recipe: Recipe, run_name: str | None, is_compatible: Compatible
) -> RunChoice:
    """Choose the run of a launch, touching nothing.

    With `run_name`: that run. Without: the newest unfinished run of this recipe that was named like this,
    `<recipe name>-<number>`, that nobody trains and that `is_compatible`, else a new one: what comes later in a run is
    changed by its name alone, and so is a run gone on with that a person named. Raises UserError when `run_name` cannot
    be a run's name.
    """
    if run_name is not None:
        return _judge(RunFolder.of(runs_dir, run_name, recipe), recipe)
    unfinished = _unfinished_runs(runs_dir, recipe_name, recipe)
    for folder in sorted(unfinished, key=_last_touched, reverse=True):
        if is_free(folder.path) and is_compatible(folder):
            return RunChoice(folder, "resumed")
    return RunChoice(RunFolder.of(runs_dir, _next_name(runs_dir, recipe_name, recipe), recipe), "new")


def first_name(recipe_name: str) -> str:
    """What `choose_run` calls the first run of a recipe."""
    return f"{_numbered(recipe_name)[0]}-1"


def take_run(
    runs_dir: Path, recipe_name: str, recipe: Recipe, run_name: str | None, is_compatible: Compatible, launch_id: str
) -> tuple[RunChoice, RunLock]:
    """Choose as `choose_run` does, make the folder if it is new, and take the run's lock.

    Two launches at the same moment get different runs, or the same named run goes to one of them.
    Raises UserError for a bad name and RunIsTrained when the named run is trained by another launch.
    """
    while True:
        choice = choose_run(runs_dir, recipe_name, recipe, run_name, is_compatible)
        try:
            if choice.state == "new" and not choice.folder.path.is_dir():
                choice.folder.create()
            lock = RunLock.acquire(choice.folder.path, launch_id)
            if _judge(choice.folder, recipe) == choice:
                return choice, lock
            lock.release()  # another launch had the run between the look and the lock
        except FileExistsError:
            continue
        except RunIsTrained:
            if run_name is not None:
                raise


def point_latest(runs_dir: Path, folder: RunFolder, link: str = LATEST) -> None:
    """Make `runs/latest` (or `runs/latest-export`) lead to a run, in one rename."""
    temporary = runs_dir / f".{link}.{secrets.token_hex(4)}"
    temporary.symlink_to(folder.name)
    try:
        os.replace(temporary, runs_dir / link)
    except OSError as error:
        temporary.unlink()
        raise UserError(f"{runs_dir / link}: expected a link to a run, which can be replaced") from error


def _judge(folder: RunFolder, recipe: Recipe) -> RunChoice:
    if not folder.exists():
        return RunChoice(folder, "new")
    completed = folder.completed_step()
    is_complete = completed is not None and completed >= recipe.tokens.train_steps
    return RunChoice(folder, "complete" if is_complete else "resumed")


def _unfinished_runs(runs_dir: Path, recipe_name: str, recipe: Recipe) -> list[RunFolder]:
    if not runs_dir.is_dir():
        return []
    _, pattern = _numbered(recipe_name)
    entries = [entry for entry in runs_dir.iterdir() if not entry.is_symlink() and pattern.fullmatch(entry.name)]
    folders = [RunFolder.of(runs_dir, entry.name, recipe) for entry in entries]
    return [folder for folder in folders if _is_unfinished(folder, recipe_name)]


def _is_unfinished(folder: RunFolder, recipe_name: str) -> bool:
    """Whether an unfinished run of the recipe is in there; what is damaged is of no concern to another run."""
    try:
        return folder.exists() and folder.header().recipe == recipe_name and folder.completed_step() is None
    except UserError:
        return False


def _last_touched(folder: RunFolder) -> float:
    files = [file for file in (folder.recipe_file, folder.metrics_file) if file.is_file()]
    return max((file.stat().st_mtime for file in files), default=0.0)


def _next_name(runs_dir: Path, recipe_name: str, recipe: Recipe) -> str:
    """The first `<recipe name>-<number>` above all that are taken. A folder without a recipe was never begun."""
    stem, pattern = _numbered(recipe_name)
    places = [place for place in (runs_dir, *seen_paths(recipe.checkpoints.checkpoints_path or "")) if place.is_dir()]
    matches = [match for place in places for entry in place.iterdir() if (match := pattern.fullmatch(entry.name))]
    taken = [int(match[1]) for match in matches if RunFolder.of(runs_dir, match[0], recipe).is_taken()]
    return f"{stem}-{max(taken, default=0) + 1}"


def _numbered(recipe_name: str) -> tuple[str, re.Pattern[str]]:
    """How runs are called that nobody gave a name: what stands before the number, and the whole."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe_name).lstrip("._-") or "run"
    return stem, re.compile(rf"{re.escape(stem)}-([0-9]{{1,9}})")
