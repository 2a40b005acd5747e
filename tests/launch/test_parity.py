"""Any topology, same training: losses, gradient norms and copies agree with the run at one rank."""

from collections.abc import Callable
from typing import Any

import pytest
from parity_cases import MATRIX, SELECTION, VARIANTS, Case, grid

from launch.train.engine import StepResult
from launch.train.parity import (
    BFLOAT16,
    FLOAT32,
    TopologyResult,
    disagreements,
    largest_differences,
    run_topologies,
    start_engine,
)
from launch.train.synthetic import synthetic_batch
from parallel.rank_pool import RankPool

ReferenceOf = Callable[[str], TopologyResult]


@pytest.fixture(scope="module")
def reference_of(rank_pool: RankPool, base_recipe: dict[str, Any]) -> ReferenceOf:
    """The run of a variant at one rank; each is made once."""
    known: dict[str, TopologyResult] = {}

    def reference(variant: str) -> TopologyResult:
        if variant not in known:
            [known[variant]] = run_topologies(base_recipe, [VARIANTS[variant]], pool=rank_pool)
        return known[variant]

    return reference


def check(case: Case, pool: RankPool, recipe: dict[str, Any], reference_of: ReferenceOf) -> None:
    reference = reference_of(case.variant)
    overrides = (*VARIANTS[case.variant], *case.overlay)
    [result] = run_topologies(recipe, [overrides], num_steps=case.num_steps, pool=pool)
    assert disagreements(reference, result, FLOAT32) == []
    assert len(result.losses) == case.num_steps
    assert (result.num_shared > 0) == case.has_copies, "copies are compared wherever there are some"


@pytest.mark.parametrize("case", SELECTION, ids=str)
def test_training_does_not_depend_on(
    case: Case, pool: RankPool, small_recipe: dict[str, Any], reference_of: ReferenceOf
) -> None:
    check(case, pool, small_recipe, reference_of)


@pytest.mark.long
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_training_does_not_depend_on_in_the_whole_matrix(
    case: Case, pool: RankPool, small_recipe: dict[str, Any], reference_of: ReferenceOf
) -> None:
    check(case, pool, small_recipe, reference_of)


def test_the_reference_learns_and_clips(pool: RankPool, reference_of: ReferenceOf) -> None:
    """Runs in which nothing happens would agree as well."""
    reference = reference_of("base")
    assert reference.losses[-1] < reference.losses[0] - 0.2
    assert max(reference.grad_norms) > 1.0, "clip_grad of the recipe is reached"


BFLOAT16_CASES = [grid(dp=2, pp=2), grid(tp=2), grid(dp=2, pp=2, tp=2, zero=1)]


def test_bfloat16_repeats_bit_by_bit_and_stays_near_the_reference(pool: RankPool, small_recipe: dict[str, Any]) -> None:
    """With ZeRO-0, data and pipeline parallelism: the case in which nanotron's own synchronisation is a race."""
    small_recipe["model"]["dtype"] = "bfloat16"
    reference, *runs = run_topologies(small_recipe, [(), *[BFLOAT16_CASES[0]] * 3], num_steps=8, pool=pool)
    assert [disagreements(reference, run, BFLOAT16) for run in runs] == [[], [], []]
    assert len({(run.weights_digest, *run.losses, *run.grad_norms) for run in runs}) == 1


@pytest.mark.long
@pytest.mark.parametrize("overlay", BFLOAT16_CASES, ids=" ".join)
def test_bfloat16_in_the_whole_matrix(overlay: tuple[str, ...], pool: RankPool, small_recipe: dict[str, Any]) -> None:
    small_recipe["model"]["dtype"] = "bfloat16"
    reference, *runs = run_topologies(small_recipe, [(), *[overlay] * 3], pool=pool)
    assert [disagreements(reference, run, BFLOAT16) for run in runs] == [[], [], []]
    assert len({(run.weights_digest, *run.losses, *run.grad_norms) for run in runs}) == 1


def evaluate_on_rank(mapping: dict[str, object]) -> tuple[float, float, StepResult]:
    engine = start_engine(mapping)
    batch = synthetic_batch(engine.recipe, engine.topology, 1, engine.context.dp_rank)
    before = engine.evaluate(batch.micro_batches) / batch.num_valid_targets
    step = engine.train_step(batch, 1e-3)
    after = engine.evaluate(batch.micro_batches) / batch.num_valid_targets
    engine.context.destroy()
    return before, after, step


def test_evaluation_is_the_loss_of_training_at_any_topology(pool: RankPool, small_recipe: dict[str, Any]) -> None:
    reference = evaluate(pool, small_recipe)
    before, after, loss = reference
    assert before == pytest.approx(loss, abs=1e-6)
    assert after < before - 0.01, "evaluation sees the updated weights"
    for overlay in (grid(pp=2, tp=2), grid(dp=2, pp=2, tp=2, mode="ALL_REDUCE", zero=1)):
        assert evaluate(pool, small_recipe, overlay) == pytest.approx(reference, abs=FLOAT32.loss)


def evaluate(pool: RankPool, recipe: dict[str, Any], overlay: tuple[str, ...] = ()) -> tuple[float, float, float]:
    from nanotron_recipes.overrides import apply_overrides

    mapping, _ = apply_overrides(recipe, overlay)
    world_size = 1
    for key in ("dp", "pp", "tp"):
        world_size *= mapping["parallelism"][key]
    (before, after, step), *others = pool.run(world_size, evaluate_on_rank, mapping)
    assert all(other[:2] == (before, after) for other in others), "every rank knows the same figure"
    return before, after, step.loss


def test_disagreements_name_the_figure_and_the_limit() -> None:
    reference = TopologyResult("as written", 1, losses=[6.0, 5.0], grad_norms=[2.0, 1.0])
    same = TopologyResult("dp=2", 2, losses=[6.0, 5.000001], grad_norms=[2.0, 1.00001])
    assert disagreements(reference, same) == []
    assert largest_differences(reference, same) == pytest.approx((1e-6, 1e-5), rel=1e-3)
    wrong = TopologyResult("dp=2", 2, losses=[6.0, 5.001], grad_norms=[2.1], unequal_copies=["a.weight"])
    losses, norms, copies = disagreements(reference, wrong)
    assert "1.0e-03" in losses and "1e-05" in losses
    assert "5.0e-02" in norms and "1e-04" in norms
    assert "a.weight" in copies


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_disagrees(value: float) -> None:
    reference = TopologyResult("as written", 1, losses=[6.0], grad_norms=[2.0])
    assert disagreements(reference, TopologyResult("dp=2", 2, losses=[value], grad_norms=[2.0]))
    assert disagreements(reference, TopologyResult("dp=2", 2, losses=[6.0], grad_norms=[value]))


def test_a_reference_must_be_as_long_as_the_run() -> None:
    reference = TopologyResult("as written", 1, losses=[6.0], grad_norms=[2.0])
    with pytest.raises(AssertionError):
        largest_differences(reference, TopologyResult("dp=2", 2, losses=[6.0, 5.0], grad_norms=[2.0, 1.0]))
