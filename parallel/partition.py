"""Which pipeline stage builds which block.

nanotron's `build_model` gives blocks to a stage until the cumulated cost has passed its share. With few layers or a
large vocabulary that leaves the last stage with nothing but the loss (4 layers, vocabulary 510, pp 4: no parameters at
all). Here the largest stage is made as small as possible and no stage is empty.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from parallel.nanotron_import import import_nanotron
from parallel.process_groups import EngineContext

import_nanotron()

from nanotron.models import NanotronModel, init_on_device_and_dtype  # noqa: E402
from nanotron.parallel.pipeline_parallel.block import PipelineBlock  # noqa: E402


def balanced_stages(costs: Sequence[int], num_stages: int) -> list[int]:
    """The stage of each block, in order, such that the most expensive stage is as cheap as possible.

    Blocks of cost 0 stay with a neighbour: at the start with the first block, else with the one before them, except
    that a run of them directly before the last costly block (the final norm before the head) goes with that.

    Raises:
        ValueError: there are more stages than blocks with a cost.
    """
    costly = [index for index, cost in enumerate(costs) if cost > 0]
    if num_stages > len(costly):
        raise ValueError(f"{num_stages} stages for {len(costly)} blocks")
    weights = [costs[index] for index in costly]
    stage_of = dict(zip(costly, _linear_partition(tuple(weights), num_stages), strict=True))
    stages = []
    for index in range(len(costs)):
        before = [i for i in costly if i <= index]
        owner = before[-1] if before else costly[0]
        if index not in stage_of and costly[-1] > index and owner == costly[-2 if len(costly) > 1 else -1]:
            owner = costly[-1]
        stages.append(stage_of[owner])
    return stages


def _linear_partition(weights: tuple[int, ...], num_stages: int) -> list[int]:
    totals = [0]
    for weight in weights:
        totals.append(totals[-1] + weight)

    @lru_cache(maxsize=None)
    def best(end: int, stages: int) -> tuple[int, int]:
        """(largest stage, start of the last one) when blocks [0, end) are cut into this many stages."""
        if stages == 1:
            return totals[end], 0
        options = ((max(best(cut, stages - 1)[0], totals[end] - totals[cut]), cut) for cut in range(stages - 1, end))
        return min(options)

    stages, end = [], len(weights)
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
