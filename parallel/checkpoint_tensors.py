"""The tensors of a checkpoint as a rank sees them: what it reads, what it writes, a copy that training leaves alone.

A rank reads all that it owns. It writes a part that no other rank writes: of every bucket the range that belongs to
its place among the data-parallel replicas (with or without ZeRO), and of what several ranks of a replica hold, such as
norms and tied embeddings, one writes. So the ranks need not agree on who writes what.
"""

from collections.abc import Callable, Mapping
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


def readable_tensors(buckets: list[Bucket], optimizer: FlatAdamW | None) -> Tensors:
    """Everything that this rank holds, as boxes that share memory with its buffers.

    Args:
        optimizer: None leaves the optimizer out (a model only).
    """
    return _collect(buckets, optimizer, lambda bucket: (0, bucket.numel), lambda slot: True)


def float32_weights(dtypes: Mapping[str, torch.dtype]) -> str | None:
    """Under which prefix a checkpoint has the weights in float32; None where it has rounded ones only.

    Args:
        dtypes: of its tensors, by their names in it.
    """
    if any(name.startswith(MASTER) for name in dtypes):
        return MASTER
    weights = [dtype for name, dtype in dtypes.items() if name.startswith(MODEL)]
    return MODEL if all(dtype == torch.float32 for dtype in weights) else None


def tensors_to_read(
    buckets: list[Bucket], optimizer: FlatAdamW | None, float32_from: str | None, *, moments: bool
) -> Tensors:
    """What this rank reads of a checkpoint, of a model in this or another dtype, as boxes in its buffers.

    The float32 values of the weights go to where this rank has such, whatever the checkpoint calls them: the master
    copy of a model in another dtype, whose own values are then those of `FlatAdamW.publish`.

    Args:
        optimizer: None leaves the optimizer out (a model only).
        float32_from: what `float32_weights` says of the checkpoint.
        moments: whether AdamW's moments are read.
    """
    found = _Boxes(lambda bucket: (0, bucket.numel), lambda slot: True)
    for bucket in buckets:
        if bucket.parameters.dtype == torch.float32:
            found.add(float32_from or MODEL, bucket, bucket.parameters, 0)
        elif optimizer is not None and float32_from is not None:
            found.add(float32_from, bucket, bucket.master, bucket.owned[0])
        else:
            found.add(MODEL, bucket, bucket.parameters, 0)
    if optimizer is not None and moments:
        found.add_moments(optimizer)
    return found.tensors()


def writable_tensors(buckets: list[Bucket], optimizer: FlatAdamW | None, context: EngineContext) -> Tensors:
    """This rank's part of a checkpoint; the parts of all ranks are disjoint and together whole."""

    def part(bucket: Bucket) -> tuple[int, int]:
        length = bucket.numel // context.dp_pg.size()
        return context.dp_rank * length, (context.dp_rank + 1) * length

    return _collect(buckets, optimizer, part, lambda slot: slot.counted)


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


class _Boxes:
    """Boxes by the name that a tensor has in a checkpoint, taken from ranges of the buckets' vectors."""

    def __init__(self, part: Callable[[Bucket], tuple[int, int]], wanted: Callable[[Slot], bool]) -> None:
        """`part`: the range of a bucket that is taken; `wanted`: whether a parameter is."""
        self._part, self._wanted = part, wanted
        self._found: dict[str, tuple[tuple[int, ...], torch.dtype, list[Box]]] = {}

    def add(self, prefix: str, bucket: Bucket, vector: torch.Tensor, start: int) -> None:
        """Take what lies in `vector`, which begins at `start` of the bucket."""
        low, high = self._part(bucket)
        low, high = max(low, start), min(high, start + vector.numel())
        for slot in bucket.slots if low < high else []:
            if self._wanted(slot):
                entry = self._found.setdefault(prefix + slot.name, (slot.shard.global_shape, vector.dtype, []))
                entry[2].extend(boxes_of_slot(slot, vector[low - start : high - start], low))

    def add_moments(self, optimizer: FlatAdamW) -> None:
        """Take AdamW's moments."""
        for bucket, start, _, vectors in optimizer.state_vectors():
            for kind in MOMENTS:
                self.add(f"{OPTIMIZER}{kind}/", bucket, vectors[kind], bucket.owned[0] + start)

    def tensors(self) -> Tensors:
        """What was taken."""
        return {name: BoxedTensor(shape, dtype, boxes) for name, (shape, dtype, boxes) in self._found.items()}


def _collect(
    buckets: list[Bucket],
    optimizer: FlatAdamW | None,
    part: Callable[[Bucket], tuple[int, int]],
    wanted: Callable[[Slot], bool],
) -> Tensors:
    found = _Boxes(part, wanted)
    for bucket in buckets:
        found.add(MODEL, bucket, bucket.parameters, 0)
        if optimizer is not None and bucket.parameters.dtype != torch.float32:
            found.add(MASTER, bucket, bucket.master, bucket.owned[0])
    if optimizer is not None:
        found.add_moments(optimizer)
    return found.tensors()
