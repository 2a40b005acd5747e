"""Boxes of global tensors: what makes a checkpoint independent of the topology that wrote it.

A rank's data is a range of a flat buffer. Seen from the global tensor that is a list of axis-aligned boxes: a flat
range of a matrix is at most the rest of a row, whole rows, and the start of a row, times the chunks of a sharded
parameter (three for q, k, v). `BoxedTensor` shows such a list to torch.distributed.checkpoint, which then writes and
reads, at any topology, exactly the elements it needs.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from parallel.buckets import Slot

Offsets = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A part of a global tensor: where it begins there, and this rank's values, of the box's shape."""

    offsets: Offsets
    values: torch.Tensor


def split_flat_range(shape: tuple[int, ...], start: int, end: int) -> list[tuple[Offsets, tuple[int, ...]]]:
    """Cut elements [start, end) of a row-major tensor into boxes (offsets, sizes), in order."""
    if start >= end:
        return []
    if len(shape) <= 1:
        return [((start,), (end - start,))]
    row = math.prod(shape[1:])
    first, last = start // row, (end - 1) // row
    boxes: list[tuple[Offsets, tuple[int, ...]]] = []
    whole_from, whole_to = first, last + 1
    if start % row or (first == last and end % row):
        boxes += _inside_row(shape, first, start - first * row, min(end - first * row, row))
        whole_from += 1
    if end % row and last >= whole_from:
        whole_to -= 1
    if whole_from < whole_to:
        offsets = (whole_from,) + (0,) * (len(shape) - 1)
        boxes.append((offsets, (whole_to - whole_from, *shape[1:])))
    if whole_to <= last and last >= whole_from:
        boxes += _inside_row(shape, last, 0, end - last * row)
    return boxes


def _inside_row(shape: tuple[int, ...], row: int, start: int, end: int) -> list[tuple[Offsets, tuple[int, ...]]]:
    return [((row, *offsets), (1, *sizes)) for offsets, sizes in split_flat_range(shape[1:], start, end)]


def boxes_of_slot(slot: Slot, vector: torch.Tensor, vector_start: int) -> list[Box]:
    """The boxes of a parameter that lie in `vector`.

    Args:
        vector: 1-D, contiguous; element 0 is element `vector_start` of the slot's bucket.
    """
    start = max(slot.offset, vector_start)
    end = min(slot.offset + slot.numel, vector_start + vector.numel())
    strides = _strides(slot.local_shape)
    boxes = []
    for offsets, sizes in split_flat_range(slot.local_shape, start - slot.offset, end - slot.offset):
        for local_slices, global_slices in slot.shard.pairs:
            cut = _intersect(offsets, sizes, local_slices, slot.local_shape)
            if cut is None:
                continue
            local_offsets, cut_sizes = cut
            position = sum(o * s for o, s in zip(local_offsets, strides, strict=True)) + slot.offset - vector_start
            values = vector.as_strided(cut_sizes, strides, vector.storage_offset() + position)
            moved = tuple(
                offset - (local.start or 0) + (whole.start or 0)
                for offset, local, whole in zip(local_offsets, local_slices, global_slices, strict=True)
            )
            boxes.append(Box(tuple(int(offset) for offset in moved), values))
    return boxes


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _intersect(
    offsets: Offsets, sizes: tuple[int, ...], slices: tuple[slice, ...], shape: tuple[int, ...]
) -> tuple[Offsets, tuple[int, ...]] | None:
    starts, lengths = [], []
    for offset, size, part, length in zip(offsets, sizes, slices, shape, strict=True):
        low = max(offset, int(part.start or 0))
        high = min(offset + size, length if part.stop is None else int(part.stop))
        if low >= high:
            return None
        starts.append(low)
        lengths.append(high - low)
    return tuple(starts), tuple(lengths)


class BoxedTensor(torch.Tensor):
    """A global tensor of which this rank holds boxes; it has a shape and no memory of its own.

    torch.distributed.checkpoint asks it through the protocol of `torch.distributed._checkpointable`.
    """

    boxes: list[Box]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, boxes: list[Box]) -> "BoxedTensor":
        tensor: BoxedTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        tensor.boxes = boxes
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as a plain function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise TypeError(f"a BoxedTensor holds parts of a tensor for a checkpoint; {func} is not possible on it")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"BoxedTensor({tuple(self.shape)}, {len(self.boxes)} boxes)"

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(box.offsets), index),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(box), properties=TensorProperties(dtype=self.dtype), size=self.shape
                ),
            )
            for index, box in enumerate(self.boxes)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for box in self.boxes:
            if index.offset is not None and box.offsets == tuple(index.offset):
                return box.values
        raise ValueError(f"no box of {index.fqn} at {index.offset}")


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=box.values.shape)
