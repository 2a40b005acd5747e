"""AdamW, clipping and ZeRO-1 on flat buffers."""

from typing import Any

import pytest
import torch

from launch.train.parity import BFLOAT16, FLOAT32, Tolerances, disagreements, run_topologies, start_engine
from launch.train.synthetic import synthetic_batch
from parallel.optimizer import sum_of_squares
from parallel.rank_pool import RankPool

LEARNING_RATES = (1e-3, 3e-3, 2e-3)


def compare_with_torch_on_rank(mapping: dict[str, object], fused: bool) -> list[str]:
    """Train one rank beside torch's AdamW on separate tensors with the same gradients; names that differ."""
    engine = start_engine(mapping)
    settings = engine.recipe.optimizer
    slots = [(bucket, slot) for bucket in engine.built.buckets for slot in bucket.slots]
    separate = [slot.view(bucket.parameters).detach().clone().requires_grad_() for bucket, slot in slots]
    groups = [
        {
            "params": [tensor for tensor, (_, slot) in zip(separate, slots, strict=True) if slot.decayed == decayed],
            "weight_decay": settings.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    factory = settings.optimizer_factory
    theirs = torch.optim.AdamW(
        groups, betas=(factory.adam_beta1, factory.adam_beta2), eps=factory.adam_eps, fused=fused
    )
    for step, lr in enumerate(LEARNING_RATES, start=1):
        batch = synthetic_batch(engine.recipe, engine.topology, step, 0)
        engine.train_step(batch, lr)
        for tensor, (bucket, slot) in zip(separate, slots, strict=True):
            tensor.grad = slot.view(bucket.gradients).clone()
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
    pairs = zip(separate, slots, strict=True)
    different = [slot.name for tensor, (bucket, slot) in pairs if not torch.equal(tensor, slot.view(bucket.parameters))]
    engine.context.destroy()
    return different


@pytest.mark.parametrize("fused", [True, False])
def test_it_is_torchs_adamw_bit_by_bit(fused: bool, pool: RankPool, small_recipe: dict[str, Any]) -> None:
    small_recipe["optimizer"]["optimizer_factory"] = {"name": "adamW", "torch_adam_is_fused": fused}
    assert pool.run(1, compare_with_torch_on_rank, small_recipe, fused) == [[]]


def norms_on_rank(mapping: dict[str, object], max_norm: float) -> tuple[float, float, float]:
    """(the norm that is reported, that of all whole gradients, that after clipping)."""
    engine = start_engine(mapping)
    engine.train_step(synthetic_batch(engine.recipe, engine.topology, 1, 0), 0.0)
    gradients = [slot.view(bucket.gradients) for bucket in engine.built.buckets for slot in bucket.slots]
    reported = engine.optimizer.grad_norm()
    exact = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    engine.optimizer.clip(reported, max_norm)
    clipped = engine.optimizer.grad_norm()
    engine.context.destroy()
    return float(reported), float(exact), float(clipped)


@pytest.mark.parametrize("max_norm", [0.25, 1e6])
def test_clipping_scales_to_the_norm(max_norm: float, pool: RankPool, small_recipe: dict[str, Any]) -> None:
    small_recipe["optimizer"]["clip_grad"] = None
    [(reported, exact, clipped)] = pool.run(1, norms_on_rank, small_recipe, max_norm)
    assert reported == pytest.approx(exact, rel=1e-6) and exact > 0.25
    assert clipped == pytest.approx(min(exact, max_norm), rel=1e-4)


@pytest.mark.parametrize(("dtype", "tolerances"), [("float32", FLOAT32), ("bfloat16", BFLOAT16)])
def test_zero_1_trains_as_zero_0(
    dtype: str, tolerances: Tolerances, pool: RankPool, small_recipe: dict[str, Any]
) -> None:
    """Only the gradient norm is added up in another order."""
    small_recipe["model"]["dtype"] = dtype
    small_recipe["parallelism"]["dp"] = 2
    matrix = [[f"optimizer.zero_stage={stage}"] for stage in (0, 1)]
    everything, parts = run_topologies(small_recipe, matrix, num_steps=6, pool=pool)
    assert parts.losses[0] == everything.losses[0]
    assert disagreements(everything, parts, tolerances) == []


@pytest.mark.parametrize("numel", [1, 4096, 5000, 6_500_000])
def test_a_long_gradients_norm_is_exact(numel: int) -> None:
    vector = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    assert float(sum_of_squares(vector)) == pytest.approx(float(vector.double().square().sum()), rel=5e-7)


def memory_on_rank(mapping: dict[str, object]) -> tuple[int, int]:
    """(elements of optimizer state, elements of parameters) on this rank."""
    engine = start_engine(mapping)
    vectors = engine.optimizer.state_vectors()
    found = (
        sum(state["exp_avg"].numel() + state["exp_avg_sq"].numel() for *_, state in vectors),
        sum(bucket.parameters.numel() for bucket in engine.built.buckets),
    )
    engine.context.destroy()
    return found


def test_zero_1_divides_the_optimizer_state(pool: RankPool, small_recipe: dict[str, Any]) -> None:
    small_recipe["parallelism"]["dp"] = 2
    [(whole, parameters), _] = pool.run(2, memory_on_rank, small_recipe)
    assert whole == pytest.approx(2 * parameters, rel=0.01)
    small_recipe["optimizer"]["zero_stage"] = 1
    halves = [state for state, _ in pool.run(2, memory_on_rank, small_recipe)]
    assert sum(halves) == pytest.approx(whole, rel=0.01) and max(halves) == pytest.approx(whole / 2, rel=0.01)
