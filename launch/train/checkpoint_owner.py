"""Whose the steps in a folder are, where that lies elsewhere than the run's own folder.

Two working directories, each with a runs/ of its own, may name one `checkpoints.checkpoints_path` and have runs of one
name; the locks of the runs' folders know nothing of each other. So such a folder says which run it belongs to, by what
that run's recipe.yaml is marked with, and is held by one launch at a time as a run is. Where nodes have disks of their
own, each disk has its owner and its holder.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.train.run_folder import OWNER_FILE, RunFolder
from launch.train.run_lock import RunIsTrained, RunLock, holder_of, is_earlier_start
from nanotron_recipes.errors import UserError
from nanotron_recipes.files import write_atomic

if TYPE_CHECKING:
    from parallel.checkpoint_disks import Disks


@dataclass(frozen=True)
class Owner:
    """The run that steps belong to.

    Attributes:
        run: `RunHeader.run` of it.
        folder: where its folder was when the first step was to be saved, for people: it may have moved.
    """

    run: str
    folder: str


def refuse_what_others_have(folder: RunFolder, launch_id: str = "") -> None:
    """Raise UserError where the steps of a run lie in a folder of another run, as far as that is seen from here;
    RunIsTrained where another launch than `launch_id` and the earlier starts of its job holds it."""
    run = folder.header().run if folder.exists() else ""
    for place in folder.checkpoint_folders():
        if _is_elsewhere(place, folder):
            _refuse_other_owner(place, run)
            holder = holder_of(place)
            if holder is not None and not is_earlier_start(holder.launch_id, launch_id):
                raise RunIsTrained(f"{place}: process {holder.pid} on {holder.host} saves here since {holder.since}")


@contextmanager
def held_checkpoints(folder: RunFolder, disks: "Disks", launch_id: str) -> Iterator[None]:
    """Hold the folder that a run saves to, on every disk, for a launch; all ranks of the world enter this together.

    Raises:
        UserError: on all ranks, where another run owns it or another launch holds it.
    """
    from parallel.together import FailedTogether, together

    locks: list[RunLock] = []

    def take() -> str:
        try:
            locks.extend(_take(folder, launch_id) if disks.is_leader else [])
        except UserError as error:
            return str(error)
        return ""

    try:
        try:
            mistakes = together(take)
        except FailedTogether as failure:
            raise UserError(f"{folder.checkpoints}: {failure}") from failure
        if any(mistakes):
            raise UserError(next(filter(None, mistakes)))
        yield
    finally:
        for lock in locks:
            lock.release()


def _take(folder: RunFolder, launch_id: str) -> list[RunLock]:
    place = folder.checkpoints
    if not _is_elsewhere(place, folder):
        return []
    lock = RunLock.acquire(place, launch_id)
    try:
        run = folder.header().run
        _refuse_other_owner(place, run)
        if not os.path.lexists(place / OWNER_FILE):
            owner = Owner(run, os.path.abspath(folder.path))
            write_atomic(place / OWNER_FILE, json.dumps(asdict(owner), indent=1) + "\n")
    except BaseException:
        lock.release()
        raise
    return [lock]


def _is_elsewhere(place: Path, folder: RunFolder) -> bool:
    return not Path(os.path.realpath(place)).is_relative_to(os.path.realpath(folder.path))


def _refuse_other_owner(place: Path, run: str) -> None:
    owner = _read_owner(place)
    if owner is not None and owner.run != run:
        raise UserError(
            f"{place}: belongs to another run, begun in {owner.folder}; choose another --run or "
            "checkpoints.checkpoints_path, or, if that run is given up, move this folder away"
        )


def _read_owner(place: Path) -> Owner | None:
    path = place / OWNER_FILE
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged; remove it if no other run saves here: the next launch writes it") from error
