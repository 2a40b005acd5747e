"""How much memory tensors take: what autograd keeps between forward and backward, and the peak of a call."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from model.build import BuiltModel
from model.micro_batch import MicroBatch


def kept_bytes(built: BuiltModel, micro_batch: MicroBatch) -> int:
    """Bytes that autograd keeps after the forward pass of a micro-batch, each storage once, without what is there
    anyway (parameters, and the micro-batch itself). The backward pass is done as well, so that gradients are complete.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = built.module(micro_batch)["loss"]
    there_anyway = [bucket.parameters for bucket in built.buckets] + _tensors_of(micro_batch)
    for tensor in there_anyway:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that was allocated on the CPU at any time of the call, over what was there when it began."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: list[Any] = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def _tensors_of(micro_batch: MicroBatch) -> list[torch.Tensor]:
    own = [micro_batch.input_ids, micro_batch.target_ids, micro_batch.target_mask, micro_batch.position_ids]
    shared = [*micro_batch.rope, micro_batch.attention.mask, micro_batch.attention.cu_seqlens]
    return [*own, *(tensor for tensor in shared if tensor is not None)]
