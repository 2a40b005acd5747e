"""Writing a checkpoint: all ranks in parallel, beside its name, and named when everything is on disk.

Order: every rank writes and flushes its tensors and reads them back for their checksums; the first rank then writes the
small files, the manifest, and renames the folder. A failure of one rank is known to all of them before the next phase
begins, so nobody waits for somebody who has given up, and what was written is removed.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict_saver import save

from nanotron_recipes.files import sync, write_atomic
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
    remove_folder,
    write_manifest,
)
from parallel.checkpoint_tensors import Tensors

T = TypeVar("T")
Group = torch_dist.ProcessGroup | None


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; raised on every rank with the same reason."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What is written beside the tensors.

    Attributes:
        folder: the checkpoint's final name, on storage that all ranks see.
        state: small JSON facts; `step` is the step whose result this is, `data` the fingerprint of the data.
        files: text files, name -> content.
        world: the topology, for people.
    """

    folder: Path
    state: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    world: Mapping[str, int] = field(default_factory=dict)


def write_checkpoint(info: CheckpointInfo, tensors: Tensors, num_bytes: int, group: Group = None) -> int:
    """Write the parts of all ranks of `group` (None: the world); every one of them calls this.

    Args:
        num_bytes: size of this rank's part; without room for all parts nothing is begun.

    Returns:
        The size of all files.

    Raises:
        SaveFailed: on every rank; nothing of it is left, and whatever had the name before still has it.
    """
    partial = info.folder.with_name(info.folder.name + PARTIAL_SUFFIX)
    is_first = not torch_dist.is_initialized() or torch_dist.get_rank(group) == 0
    needed = sum(_together(lambda: num_bytes, group))
    _together(lambda: _make_room(partial, needed) if is_first else None, group)
    try:
        _save(tensors, partial, group)
        written = _together(lambda: _own_files(partial, group), group)
        sizes = _together(lambda: _finish(info, partial, written) if is_first else 0, group)
    except (CheckpointException, SaveFailed) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        free = _together(lambda: _free_bytes(info.folder.parent) if is_first else 0, group)[0]
        _remove_if(is_first, partial)
        raise SaveFailed(f"{_reason(cause)} ({free / 1e6:,.1f} MB are free in {info.folder.parent})") from error
    return max(sizes)


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves left among the checkpoints in `folder`; nobody may be saving there."""
    for path in folder.iterdir() if folder.is_dir() else []:
        stem = path.name.removesuffix(PARTIAL_SUFFIX).removesuffix(REPLACED_SUFFIX)
        if path.name != stem and STEP_NAME.fullmatch(stem) and path.is_dir():
            remove_folder(path)


class _Writer(FileSystemWriter):
    """torch's writer, flushing every file, without the absolute path of this machine in `.metadata`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True)

    def storage_meta(self) -> StorageMeta:
        """What torch notes about the place; nothing here."""
        return StorageMeta(save_id=self.save_id)


def _save(tensors: Tensors, folder: Path, group: Group) -> None:
    with warnings.catch_warnings():
        # Without a process group torch assumes one process, which is what is meant.
        warnings.filterwarnings("ignore", message=".*single process.*")
        no_dist = not torch_dist.is_initialized()
        save(dict(tensors), storage_writer=_Writer(folder), process_group=group, no_dist=no_dist)


def _together(call: Callable[[], T], group: Group) -> list[T]:
    """Run `call` here; the results of all ranks, or SaveFailed on all of them where one failed."""
    outcome: tuple[T | None, str] = (None, "")
    try:
        outcome = (call(), "")
    except Exception as error:
        outcome = (None, _reason(error))
    outcomes = [outcome]
    if torch_dist.is_initialized():
        outcomes = [outcome] * torch_dist.get_world_size(group)
        torch_dist.all_gather_object(outcomes, outcome, group=group)
    for _, reason in outcomes:
        if reason:
            raise SaveFailed(reason)
    return [value for value, _ in outcomes]  # type: ignore[misc]  # each has a value: none has a reason


def _reason(error: BaseException) -> str:
    if isinstance(error, SaveFailed):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return where + error.strerror[0].lower() + error.strerror[1:]
    if "inline_container" in str(error):
        # torch's archive writer drops the system's reason.
        return "no space left on device, or another failure to write (torch does not say which)"
    return f"{type(error).__name__}: {error}"


def _make_room(partial: Path, needed: int) -> None:
    if os.path.lexists(partial):
        remove_folder(partial)
    partial.mkdir(parents=True)
    free = _free_bytes(partial)
    if free < needed:
        partial.rmdir()
        raise SaveFailed(f"{needed / 1e6:,.1f} MB are needed in {partial.parent} and {free / 1e6:,.1f} MB are free")


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _own_files(partial: Path, group: Group) -> tuple[FileEntry, ...]:
    rank = torch_dist.get_rank(group) if torch_dist.is_initialized() else 0
    return describe_files(partial.glob(f"__{rank}_*"))


def _finish(info: CheckpointInfo, partial: Path, written: Iterable[tuple[FileEntry, ...]]) -> int:
    for name, content in info.files.items():
        write_atomic(partial / name, content)
    write_atomic(partial / STATE_FILE, json.dumps(dict(info.state), indent=2) + "\n")
    small = [describe_file(partial / name) for name in (METADATA_FILE, STATE_FILE, *info.files)]
    entries = (*small, *(entry for part in written for entry in part))
    step, data = int(info.state.get("step", 0)), str(info.state.get("data", ""))
    manifest = Manifest(step, data, info.world, entries)
    write_manifest(partial, manifest)
    replaced = info.folder.with_name(info.folder.name + REPLACED_SUFFIX)
    if os.path.lexists(replaced):
        remove_folder(replaced)
    if os.path.lexists(info.folder):
        info.folder.rename(replaced)
    partial.rename(info.folder)
    sync(info.folder.parent)
    if os.path.lexists(replaced):
        remove_folder(replaced)
    return manifest.num_bytes


def _remove_if(wanted: bool, folder: Path) -> None:
    """Give the room back. Where even that fails, the save's own reason is the one to be told."""
    if wanted:
        shutil.rmtree(folder, ignore_errors=True)


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Size of a rank's tensors, in boxes or whole."""
    return sum(
        sum(box.values.nbytes for box in tensor.boxes) if hasattr(tensor, "boxes") else tensor.nbytes
        for tensor in tensors.values()
    )
