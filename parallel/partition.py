"""Which pipeline stage builds which block.

nanotron's `build_model` gives blocks to a stage until the cumulated cost has passed its share. With few layers or a
large vocabulary that leaves the last stage with nothing but the loss (4 layers, vocabulary 510, pp 4: no parameters at
all). Here the largest stage is made as small as possible and no stage is empty.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate

import torch

from parallel.nanotron_import import import_nanotron
from parallel.process_groups import EngineContext

import_nanotron()

from nanotron.models import NanotronModel, init_on_device_and_dtype  # noqa: E402
from nanotron.parallel.pipeline_parallel.block import PipelineBlock  # noqa: E402


def balanced_stages(costs: Sequence[int], num_stages: int) -> list[int]:
    """The stage of each block, in order, such that the most expensive stage is as cheap as possible.

    Every stage has at least one block with a cost. Among equally good cuts the earliest are taken, so that a block of
    cost 0 (the final norm before the head) goes with what follows it.

    Raises:
        ValueError: there are more stages than blocks with a cost.
    """
    num_costly = sum(cost > 0 for cost in costs)
    if num_stages > num_costly:
        raise ValueError(f"{num_stages} stages for {num_costly} blocks")
    totals = [0, *accumulate(costs)]

    @cache
    def best(end: int, stages: int) -> tuple[float, int]:
        """(largest stage, start of the last one) when blocks [0, end) are cut into this many stages."""
        if stages == 1:
            return totals[end] or math.inf, 0
        options = ((max(best(cut, stages - 1)[0], totals[end] - totals[cut] or math.inf), cut) for cut in range(end))
        return min(options, default=(math.inf, 0))

    stages: list[int] = []
    end = len(costs)
    for stage in reversed(range(num_stages)):
        start = best(end, stage + 1)[1]
        stages[:0] = [stage] * (end - start)
        end = start
    return stages


def build_stages(
    builder: Callable[[], NanotronModel], context: EngineContext, dtype: torch.dtype, device: torch.device
) -> NanotronModel:
    """Make the model and build, of its pipeline blocks, those of this rank's stage.

    Raises:
        ValueError: more pipeline stages than the model can fill.
    """
    model = builder()
    blocks = [module for module in model.modules() if isinstance(module, PipelineBlock)]
    costs = model.get_block_compute_costs()
    stages = balanced_stages([costs.get(block.module_builder, 0) for block in blocks], context.pp_pg.size())
    with init_on_device_and_dtype(device=device, dtype=dtype):
        for block, stage in zip(blocks, stages, strict=True):
            block.build_and_set_rank(stage)
    model.input_pp_rank, model.output_pp_rank = stages[0], stages[-1]
    return model
