"""The tensors of a checkpoint as a rank sees them: what it reads, what it writes, a copy that training leaves alone.

A rank reads all that it owns. It writes a part that no other rank writes: of every bucket the range that belongs to
its place among the data-parallel replicas (with or without ZeRO), and of what several ranks of a replica hold, such as
norms and tied embeddings, one writes. So the ranks need not agree on who writes what.
"""

from collections.abc import Callable
from typing import cast

import torch

from parallel.boxes import Box, BoxedTensor, boxes_of_slot
from parallel.buckets import Bucket, Slot
from parallel.optimizer import FlatAdamW
from parallel.process_groups import EngineContext

MODEL = "model/"
OPTIMIZER = "optimizer/"
MASTER = f"{OPTIMIZER}master/"
MOMENTS = ("exp_avg", "exp_avg_sq")

Tensors = dict[str, torch.Tensor]


def readable_tensors(
    buckets: list[Bucket], optimizer: FlatAdamW | None, *, master: bool = True, moments: bool = True
) -> Tensors:
    """Everything that this rank holds, as boxes that share memory with its buffers.

    Args:
        optimizer: None leaves the optimizer out (a model only).
        master: whether the float32 copy of a model in another dtype belongs to it.
        moments: whether AdamW's moments do.
    """
    return _collect(buckets, optimizer, lambda bucket: (0, bucket.numel), lambda slot: True, master, moments)


def writable_tensors(buckets: list[Bucket], optimizer: FlatAdamW | None, context: EngineContext) -> Tensors:
    """This rank's part of a checkpoint; the parts of all ranks are disjoint and together whole."""

    def part(bucket: Bucket) -> tuple[int, int]:
        length = bucket.numel // context.dp_pg.size()
        return context.dp_rank * length, (context.dp_rank + 1) * length

    return _collect(buckets, optimizer, part, lambda slot: slot.counted, True, True)


class StagingBuffer:
    """A copy of a rank's part in host memory, made anew for each save in the same place.

    Pinned where the part lies on a GPU, so that the copy runs at the speed of the link.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._is_on_gpu = False
        self.tensors: Tensors = {}
        for name, tensor in tensors.items():
            live = cast(BoxedTensor, tensor)
            boxes = []
            for box in live.boxes:
                on_gpu = box.values.device.type == "cuda"
                # Zeros, so that the memory is there before the first save has to wait for it.
                copy = torch.zeros(box.values.shape, dtype=live.dtype, pin_memory=on_gpu)
                boxes.append(Box(box.offsets, copy))
                self._pairs.append((copy, box.values))
                self._is_on_gpu |= on_gpu
            self.tensors[name] = BoxedTensor(tuple(live.shape), live.dtype, boxes)

    @property
    def num_bytes(self) -> int:
        """Size of the copy."""
        return sum(copy.nbytes for copy, _ in self._pairs)

    @torch.no_grad()
    def fill(self) -> None:
        """Copy the values of this moment; returns when they are there."""
        for copy, live in self._pairs:
            copy.copy_(live, non_blocking=True)
        if self._is_on_gpu:
            torch.cuda.current_stream().synchronize()


def _collect(
    buckets: list[Bucket],
    optimizer: FlatAdamW | None,
    part: Callable[[Bucket], tuple[int, int]],
    wanted: Callable[[Slot], bool],
    master: bool,
    moments: bool,
) -> Tensors:
    found: dict[str, tuple[tuple[int, ...], torch.dtype, list[Box]]] = {}

    def add(prefix: str, bucket: Bucket, vector: torch.Tensor, start: int) -> None:
        low, high = part(bucket)
        low, high = max(low, start), min(high, start + vector.numel())
        for slot in bucket.slots if low < high else []:
            if wanted(slot):
                entry = found.setdefault(prefix + slot.name, (slot.shard.global_shape, vector.dtype, []))
                entry[2].extend(boxes_of_slot(slot, vector[low - start : high - start], low))

    for bucket in buckets:
        add(MODEL, bucket, bucket.parameters, 0)
        if optimizer is not None and master and bucket.parameters.dtype != torch.float32:
            add(MASTER, bucket, bucket.master, bucket.owned[0])
    for bucket, start, _, vectors in optimizer.state_vectors() if optimizer is not None and moments else []:
        for kind in MOMENTS:
            add(f"{OPTIMIZER}{kind}/", bucket, vectors[kind], bucket.owned[0] + start)
    return {name: BoxedTensor(shape, dtype, boxes) for name, (shape, dtype, boxes) in found.items()}
