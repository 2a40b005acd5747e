"""No two shards of a weight may start equal or correlated: across tensor ranks, and across the layers of all stages.

One seed for all tensor-parallel ranks (every shard draws the same numbers) or for all stages (layer 3 starts as layer 1
did) trains without an error, and wastes a part of the model; losses hardly show it.
"""

import re
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.distributed as torch_dist

from parallel.buckets import Bucket, Slot
from parallel.process_groups import EngineContext

MAX_SAMPLES = 2**14
"""Elements of a shard that are looked at, evenly spread over it."""

MAX_SIGMAS = 7.0
"""Independent shards of n elements have a correlation of 0 ± 1/√n; seven times that does not happen by chance."""


@dataclass(frozen=True)
class InitialShards:
    """How the shards of all ranks start.

    Attributes:
        related: one line for each pair that is equal or correlated.
        num_pairs: how many pairs of equal shape were compared.
        largest: largest absolute correlation of two of them.
    """

    related: list[str] = field(default_factory=list)
    num_pairs: int = 0
    largest: float = 0.0


@dataclass(frozen=True)
class _Sample:
    """Of the shard of one matrix."""

    name: str
    shape: tuple[int, ...]
    rank: int
    values: torch.Tensor

    @property
    def kind(self) -> tuple[str, tuple[int, ...]]:
        """What it is compared with: the same matrix of all layers, where the shard is of the same shape."""
        return re.sub(r"\.decoder\.\d+\.", ".decoder.*.", self.name), self.shape

    def __str__(self) -> str:
        return f"{self.name} on rank {self.rank}"


def compare_initial_shards(buckets: list[Bucket], context: EngineContext) -> InitialShards:
    """Compare each matrix's shards with each other, and with those of the same matrix in other layers.

    Called by all ranks before the first step; all get the same answer. Copies (replicas, tied weights) are looked at
    once, and padding rows, which are 0 everywhere, not at all.
    """
    mine = [
        _sample(bucket, slot, context.rank)
        for bucket in buckets
        for slot in bucket.slots
        if len(slot.shard.global_shape) > 1 and slot.counted and context.dp_rank == 0
    ]
    everyone: list[list[_Sample]] = [[] for _ in range(torch_dist.get_world_size())]
    torch_dist.all_gather_object(everyone, mine)
    samples = sorted((sample for held in everyone for sample in held), key=lambda sample: sample.kind)
    related: list[str] = []
    num_pairs, largest = 0, 0.0
    for _, group in groupby(samples, key=lambda sample: sample.kind):
        members = list(group)
        values = torch.stack([member.values for member in members])
        both = (values != 0).double()
        overlap = (both @ both.T).triu(diagonal=1)
        normalized = torch.nn.functional.normalize(values, dim=1)
        correlations = normalized @ normalized.T
        compared = overlap > 0
        num_pairs += int(compared.sum())
        largest = max([largest, *correlations[compared].abs().tolist()])
        limits = (MAX_SIGMAS / overlap.clamp(min=1).sqrt()).clamp(max=0.99)
        for i, j in (compared & (correlations.abs() > limits)).nonzero().tolist():
            how = "equal" if torch.equal(values[i], values[j]) else f"correlated ({correlations[i, j]:+.2f})"
            related.append(f"{members[i]} and {members[j]} start {how}")
    return InitialShards(related, num_pairs, largest)


def _sample(bucket: Bucket, slot: Slot, rank: int) -> _Sample:
    flat = slot.view(bucket.parameters).detach().flatten()
    places = torch.linspace(0, flat.numel() - 1, min(flat.numel(), MAX_SAMPLES), dtype=torch.float64).round().long()
    return _Sample(slot.name, slot.local_shape, rank, flat[places.to(flat.device)].double().cpu())
