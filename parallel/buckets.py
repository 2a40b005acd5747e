"""Flat buffers: all parameters and gradients of a rank in a few contiguous tensors with a fixed layout.

Everything that touches every parameter (reducing gradients, the norm, AdamW, ZeRO's gather) then is a handful of
operations on long vectors. The layout depends on the model, the stage and the bucket size only, never on timing, so
repeated runs add the same numbers in the same order.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from parallel.nanotron_import import import_nanotron
from parallel.parameters import Shard, has_partial_gradient, holders_of, named_parameters, shard_of
from parallel.process_groups import EngineContext

import_nanotron()

from nanotron.parallel.parameters import NanotronParameter  # noqa: E402

ALIGNMENT = 32
"""Elements: every parameter starts at a multiple of this, so that vectorised kernels see aligned rows."""

Range = tuple[int, int]


@dataclass(frozen=True)
class Slot:
    """The place of one parameter in its bucket.

    Attributes:
        name: global name.
        offset: first element in the bucket.
        numel: number of elements that this rank holds.
        local_shape: shape of this rank's tensor.
        shard: which part of the global tensor that is.
        decayed: whether weight decay applies.
        holders: world ranks of this replica with the same values (this one included).
        partial_gradient: whether the holders' gradients are summed.
        counted: whether this rank contributes the parameter to the gradient norm (one holder does).
    """

    name: str
    offset: int
    numel: int
    local_shape: tuple[int, ...]
    shard: Shard
    decayed: bool
    holders: tuple[int, ...]
    partial_gradient: bool
    counted: bool

    @property
    def range(self) -> Range:
        return self.offset, self.offset + self.numel

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """This parameter's values in a flat tensor of the bucket's length."""
        return flat[self.offset : self.offset + self.numel].view(self.local_shape)


@dataclass
class Bucket:
    """Parameters that are reduced together.

    Attributes:
        slots: in layout order: decayed ones first, replicated ones last within each half.
        numel: length of the flat tensors, a multiple of the data-parallel size.
        owned: the range that this rank updates: all of it, or its ZeRO-1 part.
        parameters: flat values in the model's dtype, [numel]; the model's parameters are views of it.
        gradients: flat float32 gradients, [numel].
        master: float32 values of the owned range; the same memory as `parameters` where the model is float32.
    """

    slots: list[Slot]
    numel: int
    owned: Range
    parameters: torch.Tensor = field(repr=False, default_factory=lambda: torch.empty(0))
    gradients: torch.Tensor = field(repr=False, default_factory=lambda: torch.empty(0))
    master: torch.Tensor = field(repr=False, default_factory=lambda: torch.empty(0))

    @property
    def owned_gradients(self) -> torch.Tensor:
        return self.gradients[self.owned[0] : self.owned[1]]

    @property
    def owned_parameters(self) -> torch.Tensor:
        return self.parameters[self.owned[0] : self.owned[1]]

    def ranges(self, wanted: Callable[[Slot], bool]) -> list[Range]:
        """Ranges, relative to the owned part, of the wanted slots; neighbours are merged."""
        start, end = self.owned
        clipped = ((max(s.range[0], start) - start, min(s.range[1], end) - start) for s in self.slots if wanted(s))
        return merge_ranges(r for r in clipped if r[0] < r[1])


def merge_ranges(ranges: Iterable[Range]) -> list[Range]:
    """Join ranges that touch, or that only alignment gaps (which hold zeros) separate."""
    merged: list[Range] = []
    for start, end in ranges:
        if merged and start - merged[-1][1] < ALIGNMENT:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def plan_buckets(
    model: torch.nn.Module,
    context: EngineContext,
    *,
    is_decayed: Callable[[str], bool],
    bucket_bytes: int,
    shard_over_dp: bool,
) -> list[Bucket]:
    """Lay out the parameters of this rank; nothing is allocated yet.

    Buckets are filled in reverse order of the forward pass, and stand in the order in which their last gradients become
    complete. What is tied across pipeline stages gets buckets of its own: their layout is the same on every holder,
    therefore the data-parallel sum adds in the same order on all of them and the copies stay bit-equal.

    Args:
        is_decayed: says of a global name whether weight decay applies.
        bucket_bytes: size of a bucket's float32 gradients at which the next one is begun.
        shard_over_dp: ZeRO-1: every data-parallel rank owns an equal part of each bucket.
    """
    backward = list(reversed(list(named_parameters(model))))
    arrival = {name: number for number, (name, _) in enumerate(backward)}
    across_stages = [(name, parameter) for name, parameter in backward if _spans_stages(parameter, context)]
    own = [(name, parameter) for name, parameter in backward if not _spans_stages(parameter, context)]
    chunks = [
        members for kind in (across_stages, own) for members in _chunks(kind, bucket_bytes // torch.float32.itemsize)
    ]
    chunks.sort(key=lambda members: arrival[members[-1][0]])
    return [_lay_out(members, context, is_decayed, shard_over_dp) for members in chunks]


def allocate(
    buckets: list[Bucket], dtype: torch.dtype, device: torch.device, for_training: bool
) -> dict[str, torch.Tensor]:
    """Allocate the flat tensors (zeros) and return each parameter's view of its values, by global name.

    Without `for_training` there are neither gradients nor, unless the model is float32, a float32 copy.
    """
    views: dict[str, torch.Tensor] = {}
    for bucket in buckets:
        bucket.parameters = torch.zeros(bucket.numel, dtype=dtype, device=device)
        if for_training:
            bucket.gradients = torch.zeros(bucket.numel, dtype=torch.float32, device=device)
        if dtype == torch.float32:
            bucket.master = bucket.owned_parameters
        elif for_training:
            bucket.master = torch.zeros(bucket.owned[1] - bucket.owned[0], dtype=torch.float32, device=device)
        views.update({slot.name: slot.view(bucket.parameters) for slot in bucket.slots})
    return views


def _spans_stages(parameter: NanotronParameter, context: EngineContext) -> bool:
    stages = {context.get_3d_ranks(rank)[0] for rank in holders_of(parameter, context.rank)}
    return len(stages) > 1


def _chunks(
    members: list[tuple[str, NanotronParameter]], max_numel: int
) -> Iterator[list[tuple[str, NanotronParameter]]]:
    chunk: list[tuple[str, NanotronParameter]] = []
    numel = 0
    for name, parameter in members:
        chunk.append((name, parameter))
        numel += parameter.numel()
        if numel >= max_numel:
            yield chunk
            chunk, numel = [], 0
    if chunk:
        yield chunk


def _lay_out(
    members: list[tuple[str, NanotronParameter]],
    context: EngineContext,
    is_decayed: Callable[[str], bool],
    shard_over_dp: bool,
) -> Bucket:
    members = sorted(members, key=lambda member: (not is_decayed(member[0]), member[1].is_tied))
    slots, offset = [], 0
    for name, parameter in members:
        holders = holders_of(parameter, context.rank)
        slots.append(
            Slot(
                name=name,
                offset=offset,
                numel=parameter.numel(),
                local_shape=tuple(parameter.shape),
                shard=shard_of(parameter),
                decayed=is_decayed(name),
                holders=holders,
                partial_gradient=has_partial_gradient(parameter) and len(holders) > 1,
                counted=context.rank == holders[0],
            )
        )
        offset += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    dp = context.dp_pg.size()
    part = -(-offset // (dp * ALIGNMENT)) * ALIGNMENT
    owned = (context.dp_rank * part, (context.dp_rank + 1) * part) if shard_over_dp else (0, dp * part)
    return Bucket(slots, dp * part, owned)
