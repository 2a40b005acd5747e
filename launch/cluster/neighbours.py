"""Shards that one node of a job has and another lacks go from node to node, so that a store is asked once.

A node that takes the place of a lost one has nothing; the others have all of it. What no node has is left for
`data.staging` to fetch from where the data comes from. Files travel over a gloo group of one process a node, are hashed
on the way, and take their names when they are whole; `data.staging` then finds them, hashes and records them.
"""

from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as torch_dist

from data.staging import SourceToStage, Staging
from launch.cluster.local import Meeting
from parallel.checkpoint_disks import Disks
from parallel.checkpoint_files import FileEntry
from parallel.checkpoint_transfer import Transfer, spread, transfer_files
from parallel.together import gather

_TIMEOUT = timedelta(minutes=30)
"""For one file to arrive."""


def fetch_from_neighbours(staging: Staging, meeting: Meeting) -> int:
    """Bring to each node what it lacks and another has; every node of a job calls this. The number that came here.

    Args:
        meeting: as for the ranks, with a port of its own.

    Raises:
        FailedTogether: on all nodes, where one could not send or receive.
        DistError: the nodes do not find each other.
    """
    torch_dist.init_process_group(
        "gloo",
        init_method=f"tcp://{meeting.address}:{meeting.port}",
        rank=meeting.number,
        world_size=meeting.count,
        timeout=_TIMEOUT,
    )
    try:
        disks = Disks(tuple(range(meeting.count)), tuple(gather(meeting.own_address)), meeting.number)
        return sum(_fetch(source, disks) for source in staging.sources)
    finally:
        torch_dist.destroy_process_group()


def _fetch(source: SourceToStage, disks: Disks) -> int:
    there = {file.name for file in source.staged}
    lacking = {file.name for file in source.missing if not file.path.exists()}
    known = gather((there, lacking))
    transfers = spread(_lacking_files(source, known))
    for transfer in transfers:
        if transfer.target == disks.here:
            (source.folder / transfer.file.name).parent.mkdir(parents=True, exist_ok=True)
    transfer_files(transfers, source.folder, disks, None, into=source.folder)
    return _arrived(transfers, disks.here)


def _lacking_files(
    source: SourceToStage, known: list[tuple[set[str], set[str]]]
) -> Iterator[tuple[FileEntry, list[int], list[int]]]:
    """Each file that some node has and another lacks, with both."""
    for file in source.files:
        holders = [node for node, (there, _) in enumerate(known) if file.name in there]
        targets = [node for node, (_, lacking) in enumerate(known) if file.name in lacking]
        if holders and targets:
            yield FileEntry(file.name, file.size, file.sha256), holders, targets


def _arrived(transfers: list[Transfer], here: int) -> int:
    return sum(transfer.target == here for transfer in transfers)
