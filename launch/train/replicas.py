"""Whether all copies of a parameter are the same, bit by bit: replicated over data or tensor ranks, or tied.

Copies start equal and get the same updates, so a difference means a bug or a silent hardware error.
"""

from dataclasses import dataclass

import torch
import torch.distributed as torch_dist

from parallel.buckets import Bucket, Slot
from parallel.process_groups import EngineContext

ROW = 4096
"""Elements that are summed before their place counts."""


@dataclass(frozen=True)
class Difference:
    """A parameter whose copies are not all the same.

    Attributes:
        name: its global name.
        ranks: the world ranks that have a copy, those with the same bits together; the largest group first.
    """

    name: str
    ranks: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        groups = " ≠ ".join(f"rank{'s' if len(group) > 1 else ''} {', '.join(map(str, group))}" for group in self.ranks)
        return f"{self.name} ({groups})"


@dataclass(frozen=True)
class _Copies:
    """A parameter's copies: for each world rank that has one, the place of its checksum in that rank's list."""

    name: str
    places: dict[int, int]


class ReplicaCheck:
    """Compares checksums of all parameters with copies; all ranks of the world make one and call it together.

    With ZeRO-1 a replica's update of the part it owns reaches the others at every step: an error in that part is the
    same everywhere, and no comparison can see it.
    """

    def __init__(self, buckets: list[Bucket], context: EngineContext) -> None:
        self._buckets = buckets
        self._context = context
        replicas = tuple(torch_dist.get_process_group_ranks(context.dp_pg))
        mine = [(slot.name, {*slot.holders, *replicas}) for bucket in buckets for slot in bucket.slots]
        everyone: list[list[tuple[str, set[int]]]] = [[] for _ in range(torch_dist.get_world_size())]
        torch_dist.all_gather_object(everyone, mine)
        self._length = max(len(held) for held in everyone)
        self._copies = _find_copies(everyone)

    @property
    def num_shared(self) -> int:
        """Number of parameters, or of shards of one, that several ranks have."""
        return len(self._copies)

    @torch.no_grad()
    def differences(self) -> list[Difference]:
        """What differs, the same on every rank: one checksum a parameter on the device, one collective."""
        sums = [self._checksum(bucket, slot) for bucket in self._buckets for slot in bucket.slots]
        padding = torch.zeros(self._length - len(sums), dtype=torch.int64, device=self._context.device)
        mine = torch.cat([torch.stack(sums), padding]) if sums else padding
        gathered = mine.new_empty(torch_dist.get_world_size() * self._length)
        torch_dist.all_gather_into_tensor(gathered, mine, group=self._context.world_pg)
        by_rank = gathered.view(-1, self._length).tolist()
        found = []
        for copies in self._copies:
            groups: dict[int, list[int]] = {}
            for rank, place in copies.places.items():
                groups.setdefault(by_rank[rank][place], []).append(rank)
            if len(groups) > 1:
                ranks = sorted((tuple(sorted(group)) for group in groups.values()), key=lambda group: -len(group))
                found.append(Difference(copies.name, tuple(ranks)))
        return found

    def _checksum(self, bucket: Bucket, slot: Slot) -> torch.Tensor:
        """Of the parameter and, where every replica has all of it, of the float32 values behind a bfloat16 one."""
        total = checksum(slot.view(bucket.parameters))
        has_own_master = bucket.parameters.dtype != torch.float32
        if has_own_master and bucket.master.numel() == bucket.numel:
            total = total * 3 + checksum(slot.view(bucket.master))
        return total


def checksum(values: torch.Tensor) -> torch.Tensor:
    """An exact int64 scalar on the values' device that changes with any one bit, and with rows of `ROW` swapped.

    The bit patterns are summed row by row; a row's sum counts as often as an odd number of its own says, modulo 2⁶⁴.

    Args:
        values: contiguous, float32 or bfloat16.
    """
    bits = values.view(-1).view(torch.int32 if values.element_size() == 4 else torch.int16)
    whole = bits.numel() - bits.numel() % ROW
    rows = bits[:whole].view(-1, ROW).sum(dim=1, dtype=torch.int64)
    rows = torch.cat([bits[whole:].sum(dtype=torch.int64).view(1), rows])
    return (rows * torch.arange(1, 2 * rows.numel(), 2, device=rows.device)).sum()


def _find_copies(everyone: list[list[tuple[str, set[int]]]]) -> list[_Copies]:
    """Join what each rank knows: its own replica's holders and its peers in other replicas, not those of its peers."""
    places = {(name, rank): place for rank, held in enumerate(everyone) for place, (name, _) in enumerate(held)}
    groups: dict[str, list[set[int]]] = {}
    for held in everyone:
        for name, ranks in held:
            joined = set(ranks)
            apart = []
            for group in groups.get(name, []):
                if group & joined:
                    joined |= group
                else:
                    apart.append(group)
            groups[name] = [*apart, joined]
    return [
        _Copies(name, {rank: places[name, rank] for rank in sorted(group)})
        for name, joined in groups.items()
        for group in joined
        if len(group) > 1
    ]
