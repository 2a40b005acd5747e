"""Which ranks of a run write to the same disk: all of them on a shared file system, else those of a node.

It is found out, not believed: every rank leaves a file and looks whose files it sees.
"""

import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nanotron_recipes.errors import UserError
from nanotron_recipes.files import sync
from parallel.together import FailedTogether, Group, gather, rank_and_size, together


@dataclass(frozen=True)
class Disks:
    """The disks of a run, numbered in the order of their first ranks.

    Attributes:
        of_rank: for each rank of the world, the number of its disk.
        names: for each disk, the name of the node of its first rank.
        rank: this rank.
    """

    of_rank: tuple[int, ...]
    names: tuple[str, ...]
    rank: int

    @property
    def here(self) -> int:
        """The disk of this rank."""
        return self.of_rank[self.rank]

    @property
    def leaders(self) -> tuple[int, ...]:
        """For each disk, its first rank: the one that writes what is written once a disk."""
        return tuple(self.of_rank.index(disk) for disk in range(len(self.names)))

    @property
    def is_leader(self) -> bool:
        """Whether this rank is the first of its disk."""
        return self.leaders[self.here] == self.rank

    @property
    def share(self) -> tuple[int, int]:
        """(k, n): this rank is the k-th of the n ranks that share its disk."""
        mine = [rank for rank, disk in enumerate(self.of_rank) if disk == self.here]
        return mine.index(self.rank), len(mine)


def one_disk(group: Group = None) -> Disks:
    """All ranks on one disk that nobody needs to look for."""
    rank, size = rank_and_size(group)
    return Disks((0,) * size, ("",), rank)


def disk_per_node(node: str, group: Group = None) -> Disks:
    """As if every node had a disk of its own; a collective. For folders that may not be written to."""
    return _number(list(gather(node, group)), node, group)


def find_disks(folder: Path, node: str, *, is_shared: bool = False, group: Group = None) -> Disks:
    """Find out which ranks share the disk that `folder`, made where it is missing, lies on; a collective.

    Args:
        folder: where this rank will write.
        node: name of this rank's node, for people.
        is_shared: whether the recipe says that there is only one disk.

    Raises:
        UserError: on all ranks, where a folder cannot be written to, or one disk was promised and there are several.
    """
    rank, size = rank_and_size(group)
    token = gather(secrets.token_hex(8), group)[0]

    def probe(of_rank: int) -> Path:
        return folder / f".seen-by-{token}-{of_rank}"

    def leave() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        probe(rank).touch()
        sync(folder)

    try:
        try:
            together(leave, group)
        except FailedTogether as failure:
            raise UserError(f"{folder}: checkpoints cannot be written here: {failure}") from failure
        firsts = together(lambda: next(other for other in range(size) if probe(other).exists()), group)
    finally:
        with suppress(OSError):
            probe(rank).unlink()
    disks = _number(firsts, node, group)
    if is_shared and len(disks.names) > 1:
        raise UserError(
            f"checkpoints.checkpoints_path_is_shared_file_system: true: node {disks.names[1]} does not see in {folder} "
            f"what node {disks.names[0]} writes; expected storage that all nodes see, or false"
        )
    return disks


def _number(marks: list[int] | list[str], node: str, group: Group) -> Disks:
    """Disks of ranks with equal marks."""
    order = list(dict.fromkeys(marks))
    names = gather(node, group)
    rank, _ = rank_and_size(group)
    of_rank = tuple(order.index(mark) for mark in marks)
    return Disks(of_rank, tuple(names[of_rank.index(disk)] for disk in range(len(order))), rank)
