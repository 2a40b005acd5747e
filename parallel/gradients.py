"""Gradient synchronisation: accumulate in float32, sum over data-parallel replicas, sum over holders of a copy.

nanotron's own path goes through DistributedDataParallel: its hook keeps one handle for all buckets and waits only for
the last (bf16 with ZeRO-0 then gives different gradients in repeated runs), its buckets are rebuilt after the first
step, and ZeRO-1 reduces everything in one unoverlapped call. Here every bucket has its own handle, starts as soon as
its last gradient is there, in a fixed order, and all are waited for.
"""

from typing import Any

import torch
import torch.distributed as torch_dist
from torch import nn

from parallel.buckets import Bucket, Range
from parallel.parameters import named_parameters
from parallel.process_groups import EngineContext


class GradientSync:
    """Collects the gradients of one step in the buckets and reduces them.

    The order is: data-parallel sum (all-reduce, or reduce-scatter to the owner with ZeRO-1), then the sum over the
    holders of tied and replicated parameters, on the owned part only. Both sums give every holder the same bits.

    Args:
        shard_over_dp: ZeRO-1: a rank only needs the sums of the range it owns.
    """

    def __init__(self, model: nn.Module, buckets: list[Bucket], context: EngineContext, shard_over_dp: bool) -> None:
        self._buckets = buckets
        self._context = context
        self._shard_over_dp = shard_over_dp
        self._waiting = [0] * len(buckets)
        self._next_to_launch = 0
        self._handles: list[Any] = []
        self._tied_ranges = self._find_tied_ranges()
        self._register_hooks(model)

    def begin(self, num_micro_batches: int) -> None:
        """Start a step: zero the gradients; `num_micro_batches` backward passes follow."""
        for index, bucket in enumerate(self._buckets):
            bucket.gradients.zero_()
            self._waiting[index] = len(bucket.slots) * num_micro_batches
        self._next_to_launch = 0

    def finish(self) -> None:
        """End a step: afterwards `owned_gradients` of every bucket holds the sums over the global batch."""
        missing = {index: count for index, count in enumerate(self._waiting) if count}
        assert not missing, f"backward passes without a gradient for some parameters: bucket -> count {missing}"
        for handle in self._handles:
            handle.wait()
        self._handles.clear()
        self._sum_over_holders()

    def _register_hooks(self, model: nn.Module) -> None:
        places = {slot.name: (index, slot) for index, bucket in enumerate(self._buckets) for slot in bucket.slots}
        for name, parameter in named_parameters(model):
            index, slot = places[name]
            gradient = slot.view(self._buckets[index].gradients)
            if parameter.dtype == torch.float32:
                # autograd adds in place to a gradient that is there: no second copy.
                parameter.grad = gradient
                parameter.register_post_accumulate_grad_hook(self._counting_hook(index))
            else:
                parameter.register_post_accumulate_grad_hook(self._adding_hook(index, gradient))

    def _counting_hook(self, index: int) -> Any:
        def hook(parameter: torch.Tensor) -> None:
            self._one_arrived(index)

        return hook

    def _adding_hook(self, index: int, gradient: torch.Tensor) -> Any:
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            gradient.add_(parameter.grad)
            parameter.grad = None
            self._one_arrived(index)

        return hook

    def _one_arrived(self, index: int) -> None:
        self._waiting[index] -= 1
        while self._next_to_launch < len(self._buckets) and self._waiting[self._next_to_launch] == 0:
            self._launch(self._buckets[self._next_to_launch])
            self._next_to_launch += 1

    def _launch(self, bucket: Bucket) -> None:
        group = self._context.dp_pg
        if group.size() == 1:
            return
        if self._shard_over_dp and self._context.device.type == "cuda":
            handle = torch_dist.reduce_scatter_tensor(
                bucket.owned_gradients, bucket.gradients, group=group, async_op=True
            )
        else:
            # gloo has no faster reduce-scatter than an all-reduce.
            handle = torch_dist.all_reduce(bucket.gradients, group=group, async_op=True)
        self._handles.append(handle)

    def _find_tied_ranges(self) -> dict[tuple[int, ...], list[tuple[Bucket, Range]]]:
        """Owned ranges whose gradients are summed over the same holders."""
        found: dict[tuple[int, ...], list[tuple[Bucket, Range]]] = {}
        for bucket in self._buckets:
            for holders in sorted({slot.holders for slot in bucket.slots if slot.partial_gradient}):
                ranges = bucket.ranges(lambda slot, h=holders: slot.partial_gradient and slot.holders == h)  # type: ignore[misc]
                if ranges:
                    found.setdefault(holders, []).extend((bucket, r) for r in ranges)
        return found

    def _sum_over_holders(self) -> None:
        for holders, places in sorted(self._tied_ranges.items()):
            pieces = [bucket.owned_gradients[start:end] for bucket, (start, end) in places]
            joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            torch_dist.all_reduce(joined, group=self._context.group_of(holders))
            if len(pieces) > 1:
                torch._foreach_copy_(pieces, list(joined.split([piece.numel() for piece in pieces])))
