"""A run's checkpoints as one process sees them, whose files may lie on the disks of several nodes. Imports no torch."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.train.run_folder import RunFolder
from parallel.checkpoint_files import MANIFEST_FILE, Problem, read_manifest, verify_checkpoint_parts


def problems_of_step(folder: RunFolder, step: int, *, checksums: bool) -> list[Problem]:
    """What is wrong with a step's checkpoint (without `checksums`: by manifest and sizes).

    Where only one node's disk is seen, what was written to other nodes is not held against it.
    """
    problems = verify_checkpoint_parts(folder.step_folders(step), checksums=checksums, step=step)
    sees_several = len(folder.checkpoint_folders()) > 1
    return [problem for problem in problems if sees_several or problem.kind != "elsewhere"]


@contextmanager
def whole_checkpoint(folder: RunFolder, step: int) -> Iterator[Path]:
    """One folder with all files of a step: its own, or for the time being one with links to those of several nodes."""
    folders = folder.step_folders(step)
    if len(folders) == 1:
        yield folders[0]
        return
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-{step}-") as name:
        gathered = Path(name)
        for entry in read_manifest(folders[0]).files:
            holders = [where / entry.name for where in folders if _is_size_of(where / entry.name, entry.size)]
            if holders:
                (gathered / entry.name).symlink_to(holders[0].absolute())
        (gathered / MANIFEST_FILE).symlink_to((folders[0] / MANIFEST_FILE).absolute())
        yield gathered


def _is_size_of(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
