"""`general.deterministic`: on a CPU nothing changes, and what it sets is taken back."""

import os
from typing import Any

import pytest
import torch

from launch.train.parity import start_engine
from launch.train.synthetic import synthetic_batch
from nanotron_recipes.errors import UserError
from nanotron_recipes.schedule import learning_rate_at
from parallel.determinism import deterministic_kernels
from parallel.rank_pool import RankPool

CPU = torch.device("cpu")


def train_on_rank(mapping: dict[str, Any], deterministic: bool) -> tuple[list[tuple[float, float]], list[torch.Tensor]]:
    mapping = {**mapping, "general": {**mapping["general"], "deterministic": deterministic}}
    with deterministic_kernels(deterministic, CPU):
        engine = start_engine(mapping)
        results = []
        for step in range(1, 5):
            batch = synthetic_batch(engine.recipe, engine.topology, step, engine.context.dp_rank)
            result = engine.train_step(batch, learning_rate_at(engine.recipe, step))
            results.append((result.loss, result.grad_norm))
        weights = [bucket.parameters.clone() for bucket in engine.built.buckets]
        engine.context.destroy()
    assert not torch.are_deterministic_algorithms_enabled()
    return results, weights


def test_on_a_cpu_the_same_bits_come_out_either_way(pool: RankPool, small_recipe: dict[str, Any]) -> None:
    small_recipe["parallelism"] |= {"dp": 2, "tp": 2}
    small_recipe["optimizer"]["zero_stage"] = 1
    plain = pool.run(4, train_on_rank, small_recipe, False)
    for (steps, weights), (other_steps, other_weights) in zip(
        plain, pool.run(4, train_on_rank, small_recipe, True), strict=True
    ):
        assert steps == other_steps
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, other_weights, strict=True))


def test_only_while_it_is_wanted_and_as_it_was_afterwards() -> None:
    with deterministic_kernels(False, CPU):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), deterministic_kernels(True, CPU):
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic


def test_ranks_that_were_started_without_the_variable_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    cuda = torch.device("cuda", 0)
    with pytest.raises(UserError, match="started with CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        deterministic_kernels(True, cuda).__enter__()
    with deterministic_kernels(False, cuda):
        pass
