"""The row-parallel linear layer with a right backward pass when communication is asynchronous.

In nanotron 0.4 that backward pass gathers `grad_output_i @ weight_i` from all ranks i, where rank r needs
`grad_output_i @ weight_r`: the gradient of the input is wrong on every rank (reported and fixed after the release).
"""

from typing import Any

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F

from parallel.nanotron_import import import_nanotron

import_nanotron()

from nanotron import distributed as nanotron_dist  # noqa: E402
from nanotron.parallel.tensor_parallel.nn import TensorParallelRowLinear  # noqa: E402


class RowLinear(TensorParallelRowLinear):
    """nanotron's layer; with `async_communication` the gather of the backward pass overlaps a part of its matmul."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, in / tp] -> [tokens / tp, out] (REDUCE_SCATTER) or [tokens, out] (ALL_REDUCE)."""
        if not self.async_communication or self.world_size == 1:
            return super().forward(x)
        assert self.bias is None, "the asynchronous layer has no bias"
        return _OverlappedRowLinear.apply(x, self.weight, self.pg)


class _OverlappedRowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        ctx.save_for_backward(x, weight)
        partial = F.linear(x, weight)
        out = partial.new_empty((partial.shape[0] // group.size(), *partial.shape[1:]))
        nanotron_dist.reduce_scatter_tensor(out, partial.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        group = ctx.group
        mine = grads[0].contiguous()
        gathered = mine.new_empty((mine.shape[0] * group.size(), *mine.shape[1:]))
        handle = nanotron_dist.all_gather_into_tensor(gathered, mine, group=group, async_op=True)

        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        first = torch_dist.get_rank(group) * mine.shape[0]
        last = first + mine.shape[0]
        torch.matmul(mine, weight, out=grad_x[first:last])
        handle.wait()
        for part in (slice(0, first), slice(last, None)):
            if gathered[part].numel():
                torch.matmul(gathered[part], weight, out=grad_x[part])
        grad_weight = gathered.flatten(0, -2).t() @ x.flatten(0, -2)
        return grad_x, grad_weight, None
