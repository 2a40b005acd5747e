"""A run whose sequences get longer in a later stage."""

from typing import Any

import pytest
from growing_sequences import growing_batch
from parity_cases import grid

from launch.train.parity import run_topologies
from parallel.rank_pool import RankPool


def test_longer_sequences_go_through_pipeline_and_tensor_parallel_ranks(
    pool: RankPool, base_recipe: dict[str, Any]
) -> None:
    matrix = [grid(), grid(pp=2, tp=2, micro_batch=2)]
    alone, spread = run_topologies(base_recipe, matrix, num_steps=4, pool=pool, batches=growing_batch)
    assert spread.losses == pytest.approx(alone.losses, rel=1e-5)
