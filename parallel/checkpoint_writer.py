"""Writing a checkpoint: all ranks in parallel, beside its name, and named when everything is on disk.

Order: every rank writes and flushes its tensors and reads them back for their checksums; where nodes have disks of
their own, the table of the tensors and the copies go to the other disks; the first rank of each disk then writes the
small files and the manifest, and only when all have done so the folders are renamed. A failure of one rank is known to
all of them before the next phase begins, so nobody waits for somebody who has given up, and what was written is
removed.
"""

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict_saver import save

from nanotron_recipes.files import sync, write_atomic
from parallel.checkpoint_disks import Disks, one_disk
from parallel.checkpoint_files import (
    METADATA_FILE,
    PARTIAL_SUFFIX,
    REPLACED_SUFFIX,
    STATE_FILE,
    STEP_NAME,
    FileEntry,
    Manifest,
    describe_file,
    describe_files,
    discard,
    remove_own_files,
    what_is_in_the_way,
    write_manifest,
)
from parallel.checkpoint_tensors import Tensors
from parallel.checkpoint_transfer import spread, transfer_files
from parallel.together import FailedTogether, Group, reason_of, together


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; raised on every rank with the same reason."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What is written beside the tensors.

    Attributes:
        folder: the checkpoint's final name on this rank's disk.
        state: small JSON facts; `step` is the step whose result this is, `data` the fingerprint of the data.
        files: text files, name -> content.
        world: the topology, for people.
        copies: disks that each part is written to, as far as there are so many.
    """

    folder: Path
    state: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    world: Mapping[str, int] = field(default_factory=dict)
    copies: int = 1


def write_checkpoint(
    info: CheckpointInfo, tensors: Tensors, num_bytes: int, group: Group = None, disks: Disks | None = None
) -> int:
    """Write the parts of all ranks of `group` (None: the world); every one of them calls this.

    Args:
        num_bytes: size of this rank's part; without room for all parts nothing is begun.
        group: a gloo group of all ranks.
        disks: which ranks share a disk; None: all of them.

    Returns:
        The size of all files, each counted once.

    Raises:
        SaveFailed: on every rank; nothing of it is left, and whatever had the name before still has it.
    """
    disks = disks or one_disk(group)
    partial = info.folder.with_name(info.folder.name + PARTIAL_SUFFIX)
    try:
        needed = together(lambda: num_bytes, group)
        together(lambda: _make_room(info, partial, needed, disks) if disks.is_leader else None, group)
    except FailedTogether as error:
        _remove(info, partial, disks)
        raise SaveFailed(str(error)) from error
    try:
        _save(tensors, partial, group)
        parts = together(lambda: describe_files(partial.glob(f"__{disks.rank}_*")), group)
        placed = _place(parts, disks, info.copies)
        _spread_over_disks(partial, placed, disks, group)
        sizes = together(lambda: _finish(info, partial, placed) if disks.is_leader else 0, group)
        together(lambda: take_name(info.folder, partial) if disks.is_leader else None, group)
    except (CheckpointException, FailedTogether) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        free, where = min(together(lambda: (shutil.disk_usage(partial.parent).free, str(partial.parent)), group))
        _remove(info, partial, disks)
        raise SaveFailed(f"{reason_of(cause)} ({free / 1e6:,.1f} MB are free in {where})") from error
    return max(sizes)


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves left among the checkpoints in `folder`; nobody may be saving there. What others put
    among it stays where it is. Raises OSError."""
    for path in folder.iterdir() if folder.is_dir() else []:
        stem = path.name.removesuffix(PARTIAL_SUFFIX).removesuffix(REPLACED_SUFFIX)
        if path.name != stem and STEP_NAME.fullmatch(stem) and path.is_dir():
            remove_own_files(path)


class _Writer(FileSystemWriter):
    """torch's writer, flushing every file, without the absolute path of this machine in `.metadata`.

    Nothing is copied ahead from a device: the tensors are in host memory, and the writer would wait, where a GPU is
    there, for the stream of the training.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)

    def storage_meta(self) -> StorageMeta:
        """What torch notes about the place; nothing here."""
        return StorageMeta(save_id=self.save_id)


def _save(tensors: Tensors, folder: Path, group: Group) -> None:
    with warnings.catch_warnings():
        # Without a process group torch assumes one process, which is what is meant.
        warnings.filterwarnings("ignore", message=".*single process.*")
        no_dist = not torch_dist.is_initialized()
        save(dict(tensors), storage_writer=_Writer(folder), process_group=group, no_dist=no_dist)


def _make_room(info: CheckpointInfo, partial: Path, sizes: Sequence[int], disks: Disks) -> None:
    """Begin the folder of this disk, if there is room for what the ranks of `sizes` (bytes) will put into it."""
    _require_free_name(info.folder)
    if os.path.lexists(partial):
        remove_own_files(partial, info.files)
    partial.mkdir(parents=True, exist_ok=True)
    homes = [_homes(disk, disks, info.copies) for disk in disks.of_rank]
    needed = sum(size for size, disks_of_rank in zip(sizes, homes, strict=True) if disks.here in disks_of_rank)
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise FailedTogether(f"{needed / 1e6:,.1f} MB are needed in {partial.parent} and {free / 1e6:,.1f} MB are free")


def _homes(disk: int, disks: Disks, copies: int) -> list[int]:
    """The disks that get what a rank of `disk` writes: its own and those that follow."""
    count = len(disks.names)
    return [(disk + offset) % count for offset in range(min(copies, count))]


Placed = list[tuple[FileEntry, list[int]]]
"""The ranks' files and the disks that each lies on, the one of the rank that wrote it first."""


def _place(parts: Sequence[tuple[FileEntry, ...]], disks: Disks, copies: int) -> Placed:
    """Decide where every rank's files lie; the entries name the nodes where there are several disks."""
    placed = []
    for rank, files in enumerate(parts):
        homes = _homes(disks.of_rank[rank], disks, copies)
        nodes = tuple(disks.names[disk] for disk in homes) if len(disks.names) > 1 else ()
        placed += [(replace(file, nodes=nodes), homes) for file in files]
    return placed


def _spread_over_disks(partial: Path, placed: Placed, disks: Disks, group: Group) -> None:
    """Send the table, which the first rank wrote, to every disk, and the parts to those that get a copy."""
    if len(disks.names) == 1:
        return
    table = together(lambda: describe_file(partial / METADATA_FILE) if disks.rank == 0 else None, group)[0]
    assert table is not None
    rest = [disk for disk in range(len(disks.names)) if disk != disks.of_rank[0]]
    copies = [(file, homes[:1], homes[1:]) for file, homes in placed]
    transfer_files(spread([(table, [disks.of_rank[0]], rest), *copies]), partial, disks, group, into=partial)


def _finish(info: CheckpointInfo, partial: Path, placed: Placed) -> int:
    """Write the small files and the manifest of this disk; the size of all files."""
    for name, content in info.files.items():
        write_atomic(partial / name, content)
    write_atomic(partial / STATE_FILE, json.dumps(dict(info.state), indent=2) + "\n")
    small = [describe_file(partial / name) for name in (METADATA_FILE, STATE_FILE, *info.files)]
    step, data = int(info.state.get("step", 0)), str(info.state.get("data", ""))
    manifest = Manifest(step, data, info.world, (*small, *(file for file, _ in placed)))
    write_manifest(partial, manifest)
    return manifest.num_bytes


def take_name(folder: Path, partial: Path) -> None:
    """Give a folder that is complete its name; a checkpoint that had the name before goes last.

    What others had put into that one is in the new one then. Raises FailedTogether where the name is taken by something
    else, OSError.
    """
    _require_free_name(folder)
    replaced = folder.with_name(folder.name + REPLACED_SUFFIX)
    if os.path.lexists(folder):
        if os.path.lexists(replaced):
            discard(replaced)
        folder.rename(replaced)
    partial.rename(folder)
    sync(folder.parent)
    if os.path.lexists(replaced):
        discard(replaced)


def _require_free_name(folder: Path) -> None:
    reason = what_is_in_the_way(folder)
    if reason:
        raise FailedTogether(reason)


def _remove(info: CheckpointInfo, partial: Path, disks: Disks) -> None:
    """Give the room back. Where even that fails, the save's own reason is the one to be told."""
    if disks.is_leader:
        with suppress(OSError):
            remove_own_files(partial, info.files)


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Size of a rank's tensors, in boxes or whole."""
    return sum(
        sum(box.values.nbytes for box in tensor.boxes) if hasattr(tensor, "boxes") else tensor.nbytes
        for tensor in tensors.values()
    )
