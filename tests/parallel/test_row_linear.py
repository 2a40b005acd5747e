"""The row layer with asynchronous communication."""

from typing import Any

import torch

from parallel.nanotron_import import import_nanotron
from parallel.process_groups import EngineContext, init_process_group
from parallel.rank_pool import RankPool
from parallel.row_linear import RowLinear

import_nanotron()

from nanotron.parallel.tensor_parallel.enum import TensorParallelLinearMode  # noqa: E402
from nanotron.parallel.tensor_parallel.nn import TensorParallelRowLinear  # noqa: E402

TP, INPUTS, OUTPUTS = 2, 8, 6


def differences_on_rank(layer_class: type[Any]) -> list[float]:
    """Largest difference of output, input gradient and weight gradient with and without asynchrony."""
    init_process_group(torch.device("cpu"))
    context = EngineContext(1, 1, TP, torch.device("cpu"))
    results = []
    for is_async in (False, True):
        generator = torch.Generator().manual_seed(context.tp_rank)
        layer = layer_class(
            in_features=INPUTS,
            out_features=OUTPUTS,
            pg=context.tp_pg,
            mode=TensorParallelLinearMode.REDUCE_SCATTER,
            bias=False,
            async_communication=is_async,
        )
        with torch.no_grad():
            layer.weight.normal_(generator=generator)
        x = torch.randn(10, 3, INPUTS // TP, generator=generator).requires_grad_()
        y = layer(x)
        y.backward(torch.randn(y.shape, generator=generator))
        results.append((y.detach(), x.grad, layer.weight.grad))
    context.destroy()
    return [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]


def test_the_asynchronous_layer_equals_the_synchronous_one(pool: RankPool) -> None:
    assert all(max(found) < 1e-5 for found in pool.run(TP, differences_on_rank, RowLinear))


def test_the_wheels_does_not(pool: RankPool) -> None:
    """The day this fails the subclass can go."""
    assert all(found[1] > 0.1 for found in pool.run(TP, differences_on_rank, TensorParallelRowLinear))
