"""Activation recomputation: keep less of the forward pass, compute it again in the backward pass (Chen et al.,
arXiv:1604.06174)."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

Caller = Callable[..., torch.Tensor]
"""(function, *arguments) -> function(*arguments), in one way or another."""


def kept(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """Call the function; autograd keeps what its backward pass needs."""
    return function(*arguments)


def recomputed(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """Call the function; only its arguments are kept, and the backward pass calls it again.

    The second call comes when later micro-batches have been through the model: whatever belongs to a micro-batch must
    be an argument. It ends as soon as everything that was saved is there again, so that a matrix product or collective
    at the end of the function does not run twice; the collectives before it do, on all ranks in the same order. One
    whose communication is asynchronous saves its inputs when it is done, and does run twice.
    """
    result: torch.Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result
