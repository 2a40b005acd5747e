"""Initial weights that do not depend on the topology.

Each tensor is drawn whole, in float32 on the CPU generator, from a seed derived from its global name, and every rank
takes its slices. (One seed for all tensor-parallel ranks, nanotron's way, makes all shards start equal: the bug that
cost SmolLM3 a restart after 1T tokens.)
"""

import hashlib
from collections.abc import Callable

import torch

from parallel.buckets import Bucket

DrawFunction = Callable[[str, tuple[int, ...], torch.Generator], torch.Tensor]
"""(global name, global shape, generator) -> float32 CPU tensor of that shape."""


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream belongs to one tensor of one run."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big", signed=True))


@torch.no_grad()
def initialize(buckets: list[Bucket], seed: int, draw: DrawFunction) -> None:
    """Fill the flat buffers. The float32 master copy keeps the unrounded values, the parameters are their rounding."""
    for bucket in buckets:
        has_own_master = bucket.parameters.dtype != torch.float32 and bucket.master.numel() > 0
        whole = torch.zeros(bucket.numel, dtype=torch.float32) if has_own_master else bucket.parameters
        for slot in bucket.slots:
            values = draw(slot.name, slot.shard.global_shape, generator_for(seed, slot.name))
            local = slot.view(whole)
            for local_slices, global_slices in slot.shard.pairs:
                local[local_slices].copy_(values[global_slices])
        if has_own_master:
            bucket.master.copy_(whole[bucket.owned[0] : bucket.owned[1]])
            bucket.parameters.copy_(whole)
