"""A loss or a gradient that is not finite: no rank updates anything, at any topology."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import guard_plants
import pytest
from parity_cases import grid

from launch.train.engine import TrainingEngine
from launch.train.parity import FLOAT32, compare_copies, start_engine
from launch.train.synthetic import synthetic_batch
from nanotron_recipes.overrides import apply_overrides
from nanotron_recipes.schedule import learning_rate_at
from parallel.rank_pool import RankPool

NUM_STEPS = 6
POISONED = (2, 4)
UNFUSED = "optimizer.optimizer_factory.torch_adam_is_fused=false"
TOPOLOGIES = [
    (),
    grid(dp=2),
    (*grid(dp=2), UNFUSED),
    grid(tp=2),
    grid(tp=2, mode="ALL_REDUCE"),
    grid(pp=2),
    grid(dp=2, zero=1),
    (*grid(dp=2, zero=1), "model.dtype=bfloat16"),
    grid(dp=2, pp=2, tp=2, zero=1),
]


@dataclass(frozen=True)
class Outcome:
    """What one rank saw."""

    losses: dict[int, float]
    """By step, of those that were not skipped."""
    skipped: list[int]
    num_updates: int
    unequal_copies: list[str]


def train_on_rank(
    mapping: dict[str, object], plant: Callable[[TrainingEngine], None] | None, left_out: tuple[int, ...] = ()
) -> Outcome:
    """Train with a fault, or without the steps that are `left_out`."""
    engine = start_engine(mapping, plant)
    results = {}
    for step in range(1, NUM_STEPS + 1):
        if step not in left_out:
            batch = synthetic_batch(engine.recipe, engine.topology, step, engine.context.dp_rank)
            results[step] = engine.train_step(batch, learning_rate_at(engine.recipe, step))
    outcome = Outcome(
        losses={step: result.loss for step, result in results.items() if not result.skipped},
        skipped=[step for step, result in results.items() if result.skipped],
        num_updates=engine.optimizer.num_updates(),
        unequal_copies=compare_copies(engine)[0],
    )
    engine.context.destroy()
    return outcome


@pytest.fixture(scope="module")
def without_the_steps(rank_pool: RankPool, base_recipe: dict[str, Any]) -> Outcome:
    """One rank that never sees the steps that others skip: neither their batches nor their learning rates."""
    return rank_pool.run(1, train_on_rank, base_recipe, None, POISONED)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("overlay", TOPOLOGIES, ids=" ".join)
def test_a_nan_is_skipped_alike_on_all_ranks(
    overlay: tuple[str, ...], pool: RankPool, base_recipe: dict[str, Any], without_the_steps: Outcome
) -> None:
    mapping, _ = apply_overrides(base_recipe, overlay)
    parallelism = mapping["parallelism"]
    ranks = parallelism["dp"] * parallelism["pp"] * parallelism["tp"]
    outcomes = pool.run(ranks, train_on_rank, mapping, partial(guard_plants.nan_gradient, steps=POISONED))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    outcome = outcomes[0]
    assert outcome.skipped == list(POISONED) and outcome.num_updates == NUM_STEPS - len(POISONED)
    assert outcome.unequal_copies == []
    expected = without_the_steps.losses
    assert outcome.losses.keys() == expected.keys() and all(map(math.isfinite, outcome.losses.values()))
    tolerance = 1e-2 if "model.dtype=bfloat16" in overlay else FLOAT32.loss
    assert outcome.losses == pytest.approx(expected, abs=0 if overlay == () else tolerance, rel=0)


@pytest.mark.parametrize("overlay", [grid(pp=2), grid(dp=2)], ids=" ".join)
def test_a_loss_that_is_nan_is_skipped_by_stages_that_never_see_it(
    overlay: tuple[str, ...], pool: RankPool, base_recipe: dict[str, Any], without_the_steps: Outcome
) -> None:
    mapping, _ = apply_overrides(base_recipe, overlay)
    outcomes = pool.run(2, train_on_rank, mapping, partial(guard_plants.nan_loss, steps=POISONED))
    assert outcomes[0] == outcomes[1] and outcomes[0].skipped == list(POISONED)
    assert outcomes[0].losses == pytest.approx(without_the_steps.losses, abs=FLOAT32.loss, rel=0)
