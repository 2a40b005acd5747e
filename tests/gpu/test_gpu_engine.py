"""The engine on one GPU: the same training as on the CPU."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from launch.train.engine import TrainingEngine
from launch.train.parity import Tolerances, TopologyResult, disagreements, run_topologies, start_engine
from launch.train.synthetic import synthetic_batch
from nanotron_recipes.machine import CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_VARIABLE
from nanotron_recipes.schedule import learning_rate_at
from parallel.determinism import deterministic_kernels
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


def train_deterministically(recipe: dict[str, Any], device: torch.device) -> tuple[list[float], list[torch.Tensor]]:
    """In a process of its own: cuBLAS reads its variable once. The losses, and all weights at the end."""
    with deterministic_kernels(True, device):
        engine = start_engine(recipe, device=device)
        losses = [
            engine.train_step(
                synthetic_batch(engine.recipe, engine.topology, step, 0), learning_rate_at(engine.recipe, step)
            ).loss
            for step in range(1, NUM_STEPS + 1)
        ]
        weights = [bucket.parameters.cpu().clone() for bucket in engine.built.buckets]
        engine.context.destroy()
    return losses, weights


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_deterministic_runs_have_the_same_bits(
    dtype: str, attention: str, small_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a width at which kernels split their sums over blocks; at the small recipe's own they hardly do."""
    small_recipe["general"]["deterministic"] = True
    small_recipe["model"]["dtype"] = dtype
    small_recipe["model"]["model_config"] |= {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "_attn_implementation": attention,
        "max_position_embeddings": 1024,
    }
    small_recipe["tokens"] |= {"sequence_length": 1024, "global_batch_size": 4, "micro_batch_size": 2}
    monkeypatch.setenv(CUBLAS_WORKSPACE_VARIABLE, CUBLAS_WORKSPACE)
    runs = []
    for _ in range(2):
        for name, value in torchrun_environment(0, 1, free_port()).items():
            monkeypatch.setenv(name, value)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            runs.append(process.submit(train_deterministically, small_recipe, torch.device("cuda", 0)).result())
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(runs[0][1], runs[1][1], strict=True))
