"""A run's checkpoints as one process sees them, whose files may lie on the disks of several nodes. Imports no torch."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.train.run_folder import RunFolder
from nanotron_recipes.errors import UserError
from parallel.checkpoint_files import (
    Manifest,
    Problem,
    read_manifest,
    verify_checkpoint_parts,
    write_manifest,
)


def problems_of_step(folder: RunFolder, step: int, *, checksums: bool) -> list[Problem]:
    """What is wrong with a step's checkpoint (without `checksums`: by manifest and sizes).

    Where only one node's disk is seen, what was written to other nodes is not held against it.
    """
    problems = verify_checkpoint_parts(folder.step_folders(step), checksums=checksums, step=step)
    sees_several = len(folder.checkpoint_folders()) > 1
    return [problem for problem in problems if sees_several or problem.kind != "elsewhere"]


def unseen_nodes(folder: RunFolder, step: int) -> list[str]:
    """Nodes with parts of a step's checkpoint that only they have, and whose disks are not seen from here."""
    if len(folder.checkpoint_folders()) > 1:
        return []
    try:
        manifest = manifest_of_step(folder, step)
    except UserError:
        return []
    elsewhere = verify_checkpoint_parts(folder.step_folders(step), checksums=False, step=step)
    entries = [manifest.entry(problem.file) for problem in elsewhere if problem.kind == "elsewhere"]
    return sorted({node for entry in entries if entry is not None for node in entry.nodes})


def manifest_of_step(folder: RunFolder, step: int) -> Manifest:
    """What a step's checkpoint says of itself, on the first disk where that is not damaged; UserError without one."""
    damaged: UserError | None = None
    for path in folder.step_folders(step):
        try:
            return read_manifest(path)
        except UserError as error:
            damaged = damaged or error
    assert damaged is not None
    raise damaged


@contextmanager
def whole_checkpoint(folder: RunFolder, step: int) -> Iterator[Path]:
    """One folder with all files of a step: its own, or for the time being one with links to those of several nodes."""
    folders = folder.step_folders(step)
    if len(folders) == 1:
        yield folders[0]
        return
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-{step}-") as name:
        gathered = Path(name)
        manifest = manifest_of_step(folder, step)
        for entry in manifest.files:
            holders = [where / entry.name for where in folders if _is_size_of(where / entry.name, entry.size)]
            if holders:
                (gathered / entry.name).symlink_to(holders[0].absolute())
        write_manifest(gathered, manifest)
        yield gathered


def _is_size_of(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
