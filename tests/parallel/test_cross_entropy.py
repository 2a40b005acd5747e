"""The vocabulary-parallel loss against torch's own on whole logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel.process_groups import EngineContext, init_process_group
from parallel.rank_pool import RankPool

COLUMNS = 24
"""Columns of the logits; those at and after `vocabulary` are padding."""


def inputs(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets, and how much each token counts."""
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(5, 3, COLUMNS, generator=generator)
    targets = torch.randint(0, vocabulary, (5, 3), generator=generator)
    return logits, targets, torch.rand(5, 3, generator=generator)


def losses_on_rank(tp: int, z: float, vocabulary: int) -> tuple[Any, ...]:
    """(nll, z-loss, this rank's part of the gradient of the weighted sum of both)."""
    init_process_group(torch.device("cpu"))
    context = EngineContext(1, 1, tp, torch.device("cpu"))
    logits, targets, weights = inputs(vocabulary)
    logits[..., vocabulary:] = float("-inf")
    mine = logits.chunk(tp, dim=-1)[context.tp_rank].clone().requires_grad_()
    nll, z_loss = vocab_parallel_cross_entropy(mine, targets, context.tp_pg, z)
    ((nll + z_loss) * weights).sum().backward()
    context.destroy()
    assert mine.grad is not None
    return nll.detach().numpy(), z_loss.detach().numpy(), mine.grad.numpy()


def check(pool: RankPool, tp: int, z: float, vocabulary: int) -> None:
    logits, targets, weights = inputs(vocabulary)
    real = logits[..., :vocabulary].double().requires_grad_()
    nll = F.cross_entropy(real.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    z_loss = z * real.logsumexp(-1).square()
    ((nll + z_loss) * weights).sum().backward()
    assert real.grad is not None

    results = [
        [torch.from_numpy(part).double() for part in result]
        for result in pool.run(tp, losses_on_rank, tp, z, vocabulary)
    ]
    for ours_nll, ours_z, _ in results:
        torch.testing.assert_close(ours_nll, nll.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours_z, z_loss.detach(), rtol=1e-5, atol=1e-6)
    gradient = torch.cat([result[2] for result in results], dim=-1)
    torch.testing.assert_close(gradient, F.pad(real.grad, (0, COLUMNS - vocabulary)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("z", [0.0, 0.1])
def test_value_and_gradient_are_those_of_torch(tp: int, z: float, pool: RankPool) -> None:
    check(pool, tp, z, COLUMNS)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("vocabulary", [COLUMNS - 1, COLUMNS // 2])
def test_padding_changes_nothing(tp: int, vocabulary: int, pool: RankPool) -> None:
    """Even where all columns of the last rank are padding."""
    check(pool, tp, 0.1, vocabulary)
