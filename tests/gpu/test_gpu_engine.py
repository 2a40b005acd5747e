"""The engine on one GPU: the same training as on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from launch.train.engine import TrainingEngine
from launch.train.parity import Tolerances, TopologyResult, disagreements, run_topologies, start_engine
from launch.train.synthetic import synthetic_batch
from nanotron_recipes.schedule import learning_rate_at
from parallel.rank_pool import RankPool, free_port, torchrun_environment

pytestmark = pytest.mark.gpu

NUM_STEPS = 8
FLOAT32_ON_ANOTHER_DEVICE = Tolerances(loss=1e-3, grad_norm=1e-2)
"""Other kernels add in another order, and AdamW's first steps amplify differences of gradients near zero."""

BFLOAT16_AGAINST_FLOAT32 = Tolerances(loss=2e-2, grad_norm=1e-1)


@contextmanager
def engine_on_gpu(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainingEngine]:
    assert torch.cuda.is_available(), "tests marked gpu need a CUDA device"
    for name, value in torchrun_environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    engine = start_engine(recipe, device=torch.device("cuda", 0))
    try:
        yield engine
    finally:
        engine.context.destroy()


def train_on_gpu(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> TopologyResult:
    with engine_on_gpu(recipe, monkeypatch) as engine:
        steps = [
            engine.train_step(
                synthetic_batch(engine.recipe, engine.topology, step, 0), learning_rate_at(engine.recipe, step)
            )
            for step in range(1, NUM_STEPS + 1)
        ]
    return TopologyResult("one GPU", 1, [step.loss for step in steps], [step.grad_norm for step in steps])


@pytest.mark.parametrize(
    ("dtype", "tolerances"), [("float32", FLOAT32_ON_ANOTHER_DEVICE), ("bfloat16", BFLOAT16_AGAINST_FLOAT32)]
)
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_one_gpu_trains_as_the_cpu_does_in_float32(
    dtype: str,
    tolerances: Tolerances,
    zero_stage: int,
    pool: RankPool,
    small_recipe: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [reference] = run_topologies(small_recipe, [()], num_steps=NUM_STEPS, pool=pool)
    small_recipe["model"]["dtype"] = dtype
    small_recipe["optimizer"]["zero_stage"] = zero_stage
    assert disagreements(reference, train_on_gpu(small_recipe, monkeypatch), tolerances) == []


def test_the_context_is_nccl_on_the_gpu(small_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_on_gpu(small_recipe, monkeypatch) as engine:
        assert torch.distributed.get_backend() == "nccl"
        for bucket in engine.built.buckets:
            assert bucket.parameters.is_cuda and bucket.gradients.is_cuda and bucket.master.is_cuda
        assert type(engine.built.module.model.p2p).__module__.startswith("nanotron."), "nccl's sends do not block"


def test_evaluation_on_the_gpu_is_the_loss_of_training(
    small_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_on_gpu(small_recipe, monkeypatch) as engine:
        batch = synthetic_batch(engine.recipe, engine.topology, 1, 0)
        before = engine.evaluate(batch.micro_batches) / batch.num_valid_targets
        assert engine.train_step(batch, 1e-3).loss == pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_update_leaves_everything_alone_and_the_host_never_waits(
    fused: bool, small_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_recipe["optimizer"]["optimizer_factory"] = {"torch_adam_is_fused": fused}
    with engine_on_gpu(small_recipe, monkeypatch) as engine:
        assert not engine.train_step(synthetic_batch(engine.recipe, engine.topology, 1, 0), 1e-3).skipped
        touched = [bucket.parameters for bucket in engine.built.buckets]
        touched += [part for *_, state in engine.optimizer.state_vectors() for part in state.values()]
        before = [part.clone() for part in touched]
        for bucket in engine.built.buckets:
            bucket.gradients.fill_(torch.nan)
        skipped = torch.ones((), device=engine.context.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.optimizer.step(1e-3, skipped)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(part, old) for part, old in zip(touched, before, strict=True))
        assert engine.optimizer.num_updates() == 1
