"""Bringing the parts of a checkpoint that a node's ranks need to its disk, from the nodes that have them."""

from collections.abc import Callable
from pathlib import Path

from torch.distributed.checkpoint.default_planner import create_default_local_load_plan

from parallel.checkpoint_disks import Disks
from parallel.checkpoint_files import PARTIAL_SUFFIX, FileEntry, Manifest, remove_own_files, write_manifest
from parallel.checkpoint_reader import CheckpointReader
from parallel.checkpoint_search import SoundCheckpoint
from parallel.checkpoint_tensors import Tensors
from parallel.checkpoint_transfer import Transfer, spread, transfer_files
from parallel.checkpoint_writer import take_name
from parallel.together import Group, together


def fetch_parts(
    checkpoint: SoundCheckpoint,
    folder: Path,
    tensors: Callable[[Path], Tensors],
    disks: Disks,
    group: Group = None,
    scratch: Path | None = None,
) -> Path:
    """Make sure that each disk has the files from which its ranks read; every rank calls this.

    Damaged files are replaced by good ones. What arrives is named when it is whole.

    Args:
        folder: the checkpoint on this rank's disk, where it may be missing.
        tensors: what this rank reads of a checkpoint whose table lies in this folder.
        group: a gloo group of all ranks.
        scratch: where to put what is fetched instead, beside links to what is here, when `folder` is another run's.

    Returns:
        The folder to read, on this rank's disk.

    Raises:
        FailedTogether: on all ranks, where files could not be sent or received.
        UserError: the checkpoint's table cannot be read.
    """
    if len(disks.names) == 1:
        return folder
    fetch = _Fetch(checkpoint, folder, scratch, disks, group)
    fetch.bring([{entry.name for entry in checkpoint.manifest.files if not entry.nodes}] * len(disks.names))
    wanted: list[set[str]] = [set() for _ in disks.names]
    found = together(lambda: _files_of(tensors(fetch.place), fetch.place), group)
    for disk, names in zip(disks.of_rank, found, strict=True):
        wanted[disk] |= names
    fetch.bring(wanted)
    return fetch.finish()


def bring_all(checkpoint: SoundCheckpoint, folder: Path, disk: int, disks: Disks, group: Group = None) -> None:
    """Make sure that one disk has every file of a checkpoint; every rank calls this.

    Args:
        folder: the checkpoint on this rank's disk, where it may be missing.
        group: a gloo group of all ranks.

    Raises:
        FailedTogether: on all ranks, where files could not be sent or received.
    """
    everything = {entry.name for entry in checkpoint.manifest.files}
    fetch = _Fetch(checkpoint, folder, None, disks, group)
    fetch.bring([everything if number == disk else set() for number in range(len(disks.names))])
    fetch.finish()


def _files_of(tensors: Tensors, folder: Path) -> set[str]:
    """The files that hold any part of `tensors`."""
    table = CheckpointReader(folder).read_metadata()
    items = create_default_local_load_plan(dict(tensors), table, strict=False).items
    assert table.storage_data is not None
    return {table.storage_data[item.storage_index].relative_path for item in items}


class _Fetch:
    """The place of each disk: the checkpoint's own folder, or one that is filled first."""

    def __init__(
        self, checkpoint: SoundCheckpoint, folder: Path, scratch: Path | None, disks: Disks, group: Group
    ) -> None:
        self._manifest: Manifest = checkpoint.manifest
        self._holders = {name: list(on) for name, on in checkpoint.holders.items()}
        self._own_folder, self._scratch = folder, scratch
        self._disks, self._group = disks, group
        self._partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
        self._places = [folder] * len(disks.names)
        for disk in range(len(disks.names)):
            if not checkpoint.holds_manifest(disk):
                self._places[disk] = scratch or self._partial
        together(self._begin, group)

    @property
    def place(self) -> Path:
        """Where the files of this rank's disk are."""
        return self._places[self._disks.here]

    def bring(self, wanted: list[set[str]]) -> None:
        """Bring files to the disks that lack them; `wanted` has their names for each disk."""
        entries = [entry for entry in self._manifest.files if any(entry.name in names for names in wanted)]
        lacking = [
            (
                entry,
                self._holders[entry.name],
                [disk for disk in range(len(wanted)) if self._lacks(entry, disk, wanted)],
            )
            for entry in entries
        ]
        transfers = spread(lacking)
        self._move_to_scratch(transfers)
        transfer_files(transfers, self._own_folder, self._disks, self._group, into=self.place)
        for transfer in transfers:
            self._holders[transfer.file.name].append(transfer.target)

    def finish(self) -> Path:
        """Give the folder that was filled its name; the folder to read."""
        if self.place == self._partial:
            together(lambda: take_name(self._own_folder, self._partial) if self._disks.is_leader else None, self._group)
        else:
            together(lambda: None, self._group)
        return self._own_folder if self.place == self._partial else self.place

    def _lacks(self, entry: FileEntry, disk: int, wanted: list[set[str]]) -> bool:
        return entry.name in wanted[disk] and disk not in self._holders[entry.name]

    def _move_to_scratch(self, transfers: list[Transfer]) -> None:
        """Another run's folder is not written to."""
        if self._scratch is None:
            return
        moving = {transfer.target for transfer in transfers if self._places[transfer.target] == self._own_folder}
        for disk in moving:
            self._places[disk] = self._scratch
        together(lambda: self._begin() if self._disks.here in moving else None, self._group)

    def _begin(self) -> None:
        """Make the folder of this disk where it is a new one, with links to what is here already."""
        if self.place == self._own_folder or not self._disks.is_leader:
            return
        if self.place.exists():
            remove_own_files(self.place, [entry.name for entry in self._manifest.files])
        self.place.mkdir(parents=True, exist_ok=True)
        for entry in self._manifest.files:
            if self._disks.here in self._holders[entry.name]:
                (self.place / entry.name).symlink_to((self._own_folder / entry.name).absolute())
        write_manifest(self.place, self._manifest)
