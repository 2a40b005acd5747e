"""The loss of an exported model on what is held out of each source: what the run's own validation measures."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from data.batch import MicroBatch
from data.plan import DataPlan
from nanotron_recipes.recipe import Recipe

if TYPE_CHECKING:
    import torch


def source_losses(model: Any, plan: DataPlan, recipe: Recipe, batch_size: int) -> dict[str, float]:
    """Nats per token by source, on the sequences that the run validates on (at least one batch of it).

    Args:
        model: a causal language model of transformers.
        batch_size: sequences at a time. Where documents are masked from each other each is a sequence of its own.
    """
    count = max(recipe.tokens.limit_val_batches, 1) * plan.global_batch_size
    losses = {}
    for source in plan.sources:
        held_out = plan.validation(source, count, micro_batch_size=batch_size)
        if held_out.num_valid_targets:
            total = sum(_nll(model, batch) for batch in held_out.micro_batches)
            losses[source] = total / held_out.num_valid_targets
    return losses


def _nll(model: Any, batch: MicroBatch) -> float:
    """Sum over the valid targets of a micro-batch, in nats."""
    import torch

    size, length = batch.input_ids.shape
    total = 0.0
    with torch.inference_mode():
        for pieces in _alike(_pieces(batch), size * length):
            width = max(end - start for _, start, end in pieces)
            inputs = torch.zeros(len(pieces), width, dtype=torch.int64)
            targets = torch.full((len(pieces), width), -100)
            for number, (row, start, end) in enumerate(pieces):
                inputs[number, : end - start] = torch.from_numpy(batch.input_ids[row, start:end])
                masked = np.where(batch.target_mask[row, start:end], batch.target_ids[row, start:end], -100)
                targets[number, : end - start] = torch.from_numpy(masked)
            total += _sum_of_batch(model, inputs, targets)
    return total


def _sum_of_batch(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """What fills up the rows stands behind what is asked for, and is seen by none of it."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=inputs.to(model.device), use_cache=False).logits.float()
    flat = targets.to(model.device).flatten()
    return float(cross_entropy(logits.flatten(0, 1), flat, ignore_index=-100, reduction="sum"))


def _pieces(batch: MicroBatch) -> Iterator[tuple[int, int, int]]:
    """The documents of a micro-batch that have valid targets, as (row, start, end); without masking whole rows."""
    for row, positions in enumerate(batch.position_ids):
        starts = [*np.flatnonzero(positions == 0).tolist(), len(positions)]
        for start, end in pairwise(starts):
            if batch.target_mask[row, start:end].any():
                yield row, start, end


def _alike(pieces: Iterator[tuple[int, int, int]], most_tokens: int) -> Iterator[list[tuple[int, int, int]]]:
    """Groups of pieces of similar length, filled up no larger than the micro-batch is."""
    group: list[tuple[int, int, int]] = []
    for piece in sorted(pieces, key=lambda each: each[2] - each[1]):
        if group and (len(group) + 1) * (piece[2] - piece[1]) > most_tokens:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group
