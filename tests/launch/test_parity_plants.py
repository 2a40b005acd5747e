"""The parity check sees planted bugs: what passes for the healthy engine fails with each of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import parity_plants
import pytest
from parity_cases import PADDING, VARIANTS, grid

from launch.train.engine import TrainingEngine
from launch.train.parity import FLOAT32, TopologyResult, disagreements, run_topologies
from parallel.rank_pool import RankPool

NUM_STEPS = 3
EMBEDDING = "token_embedding.weight"


@dataclass(frozen=True)
class Planted:
    """A bug, and a topology at which it matters."""

    name: str
    plant: Callable[[TrainingEngine], None]
    overlay: tuple[str, ...]
    variant: str = "base"

    def __str__(self) -> str:
        return self.name


PLANTS = [
    Planted("one seed for all tp ranks", parity_plants.one_seed_for_all_tensor_ranks, grid(tp=2)),
    Planted(
        "no sum of the tied gradient over stages",
        partial(parity_plants.without_sum_over_holders, suffix=EMBEDDING),
        grid(pp=2),
    ),
    Planted(
        "no sum of the norms' gradients in sequence parallelism",
        partial(parity_plants.without_sum_over_holders, suffix="layernorm.weight"),
        grid(tp=2),
    ),
    Planted(
        "no sum of the QK-norm gains' gradients",
        partial(parity_plants.without_sum_over_holders, suffix="q_norm.weight"),
        grid(tp=2, mode="ALL_REDUCE"),
        "qk-norm",
    ),
    Planted(
        "k and v swapped in one shard", partial(parity_plants.swapped_chunks, suffix="qkv_proj.weight"), grid(tp=2)
    ),
    Planted(
        "gate and up swapped in one shard",
        partial(parity_plants.swapped_chunks, suffix="gate_up_proj.weight"),
        grid(tp=2, mode="ALL_REDUCE"),
    ),
    Planted("mean of micro-batch means", parity_plants.mean_of_micro_batch_means, grid(micro_batch=1)),
    Planted("one bucket not reduced", parity_plants.without_the_sum_of_the_first_bucket, grid(dp=2, pp=2)),
    Planted("padding in the softmax", parity_plants.padding_in_the_softmax, (*grid(tp=2), f"{PADDING}=20")),
]


@pytest.fixture(scope="module")
def healthy(rank_pool: RankPool, base_recipe: dict[str, Any]) -> Callable[[str, tuple[str, ...]], TopologyResult]:
    """A run without a bug; each is made once."""
    known: dict[tuple[str, ...], TopologyResult] = {}

    def run(variant: str, overlay: tuple[str, ...]) -> TopologyResult:
        overrides = (*VARIANTS[variant], *overlay)
        if overrides not in known:
            [known[overrides]] = run_topologies(base_recipe, [overrides], num_steps=NUM_STEPS, pool=rank_pool)
        return known[overrides]

    return run


@pytest.mark.parametrize("planted", PLANTS, ids=str)
def test_parity_fails_with(
    planted: Planted,
    pool: RankPool,
    base_recipe: dict[str, Any],
    healthy: Callable[[str, tuple[str, ...]], TopologyResult],
) -> None:
    reference = healthy(planted.variant, ())
    assert disagreements(reference, healthy(planted.variant, planted.overlay), FLOAT32) == []
    overrides = (*VARIANTS[planted.variant], *planted.overlay)
    [result] = run_topologies(base_recipe, [overrides], num_steps=NUM_STEPS, pool=pool, plant=planted.plant)
    assert disagreements(reference, result, FLOAT32), "the bug went unnoticed"


def test_the_mean_of_means_disagrees_with_itself_at_another_micro_batch(
    pool: RankPool, base_recipe: dict[str, Any]
) -> None:
    """Seen without a healthy run to compare with, as it would be if it were the engine's own way."""
    few, many = run_topologies(
        base_recipe,
        [grid(micro_batch=4), grid(micro_batch=1)],
        num_steps=NUM_STEPS,
        pool=pool,
        plant=parity_plants.mean_of_micro_batch_means,
    )
    assert disagreements(few, many, FLOAT32)


def test_drifting_copies_are_named(pool: RankPool, base_recipe: dict[str, Any]) -> None:
    """QK-norm gains that are not summed hardly move the loss; their copies give them away."""
    plant = partial(parity_plants.without_sum_over_holders, suffix="q_norm.weight")
    overrides = (*VARIANTS["qk-norm"], *grid(tp=2, mode="ALL_REDUCE"))
    [result] = run_topologies(base_recipe, [overrides], num_steps=NUM_STEPS, pool=pool, plant=plant)
    assert {name.rsplit(".", 2)[1] for name in result.unequal_copies} == {"q_norm"}
    assert len(result.unequal_copies) == base_recipe["model"]["model_config"]["num_hidden_layers"]
