"""Files of a checkpoint on their way from the disk of one node to that of another, over the ranks' own connections.

Every rank knows all transfers and takes part in its own, in their order, so that nobody waits for ever. What arrives
takes its name when its size and checksum are those of the manifest.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as torch_dist

from nanotron_recipes.files import sync
from parallel.checkpoint_disks import Disks
from parallel.checkpoint_files import FileEntry
from parallel.together import Group, reason_of, together

_PIECE_BYTES = 1 << 26
_INCOMING = ".incoming"


@dataclass(frozen=True)
class Transfer:
    """One file that goes from the disk `source` to the disk `target`."""

    file: FileEntry
    source: int
    target: int


def spread(files: Iterable[tuple[FileEntry, Sequence[int], Sequence[int]]]) -> list[Transfer]:
    """Transfers for files (what, the disks that have it, the disks that lack it), the sending shared out."""
    sent: dict[int, int] = {}
    transfers = []
    for file, holders, lacking in files:
        for target in lacking:
            source = min(holders, key=lambda disk: (sent.get(disk, 0), disk))
            sent[source] = sent.get(source, 0) + file.size
            transfers.append(Transfer(file, source, target))
    return transfers


def transfer_files(transfers: Sequence[Transfer], folder: Path, disks: Disks, group: Group, into: Path) -> None:
    """Carry out `transfers`, the same on all ranks; every rank of `group` (a gloo group) calls this.

    Args:
        folder: where this rank's disk has the files that it sends.
        into: where it puts those that it receives; the folder exists.

    Raises:
        FailedTogether: on all ranks, where one could not send or receive; only whole files have taken their names.
    """
    failures: list[str] = []
    for transfer in transfers if disks.is_leader else ():
        try:
            if transfer.source == disks.here:
                _send(folder / transfer.file.name, transfer.file.size, disks.leaders[transfer.target], group)
            elif transfer.target == disks.here:
                _receive(into / transfer.file.name, transfer.file, disks.leaders[transfer.source], group)
        except (OSError, ValueError) as error:
            failures.append(f"{transfer.file.name}: {reason_of(error)}")

    def report() -> None:
        if failures:
            raise OSError(0, failures[0])
        if any(transfer.target == disks.here for transfer in transfers):
            sync(into)

    together(report, group)


def _send(path: Path, size: int, to: int, group: Group) -> None:
    """Send `size` bytes whatever happens: the receiver waits for them, and will find out what is wrong with them."""
    failure: OSError | None = None
    file: io.BufferedReader | None = None
    try:
        file = path.open("rb")
    except OSError as error:
        failure = error
    for length in _pieces(size):
        piece = torch.zeros(length, dtype=torch.uint8)
        try:
            if file is not None:
                file.readinto(_bytes_of(piece))
        except OSError as error:
            failure = error
        torch_dist.send(piece, group=group, group_dst=to)
    if file is not None:
        file.close()
    if failure is not None:
        raise failure


def _receive(path: Path, entry: FileEntry, source: int, group: Group) -> None:
    """Receive all bytes even where they cannot be written: the sender sends them anyway."""
    incoming, digest = path.with_name(f".{path.name}{_INCOMING}"), hashlib.sha256()
    failure: OSError | None = None
    file: io.FileIO | None = None
    try:
        file = incoming.open("wb", buffering=0)
    except OSError as error:
        failure = error
    for length in _pieces(entry.size):
        piece = torch.empty(length, dtype=torch.uint8)
        torch_dist.recv(piece, group=group, group_src=source)
        values = _bytes_of(piece)
        digest.update(values)
        try:
            if file is not None and failure is None:
                _write_all(file, values)
        except OSError as error:
            failure = error
    try:
        if file is not None:
            os.fsync(file.fileno())
            file.close()
        if failure is not None:
            raise failure
        if digest.hexdigest() != entry.sha256:
            raise ValueError("what arrived is not what was written (SHA-256 differs)")
        incoming.replace(path)
    finally:
        incoming.unlink(missing_ok=True)


def _write_all(file: io.FileIO, values: memoryview) -> None:
    while len(values):
        values = values[file.write(values) :]


def _bytes_of(piece: torch.Tensor) -> memoryview:
    return memoryview(piece.numpy())  # type: ignore[arg-type]  # an array is a buffer


def _pieces(size: int) -> Iterable[int]:
    for begin in range(0, size, _PIECE_BYTES):
        yield min(_PIECE_BYTES, size - begin)
