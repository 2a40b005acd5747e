"""Random token batches with documents of uneven length: data for parity runs and benchmarks that need no corpus."""

import numpy as np

from data.batch import StepBatch, micro_batch_from_windows
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.topology import Topology

MEAN_DOCUMENT_LENGTH = 24
"""Tokens; short enough that every small window has several documents, so that masks and counts are uneven."""


def synthetic_batch(recipe: Recipe, topology: Topology, step: int, dp_rank: int) -> StepBatch:
    """The part of step `step`'s global batch that data-parallel rank `dp_rank` trains on; a pure function."""
    length = recipe.tokens.sequence_length
    rng = np.random.default_rng((recipe.general.seed, step))
    shape = (topology.global_batch_size, length + 1)
    tokens = rng.integers(0, recipe.model.architecture.vocab_size, size=shape)
    # Every other token repeats its neighbour's successor: something that can be learned.
    tokens[:, 1::2] = (tokens[:, 0:-1:2] + 1) % recipe.model.architecture.vocab_size
    starts = rng.random(shape) < 1 / MEAN_DOCUMENT_LENGTH
    starts[:, 0] = True
    windows = micro_batch_from_windows(tokens, starts, restart_positions=recipe.model.architecture.use_doc_masking)
    per_rank = topology.micro_batch_size * topology.num_micro_batches
    first = dp_rank * per_rank
    micro_batches = [
        micro_batch_from_windows(
            tokens[row : row + topology.micro_batch_size],
            starts[row : row + topology.micro_batch_size],
            restart_positions=recipe.model.architecture.use_doc_masking,
        )
        for row in range(first, first + per_rank, topology.micro_batch_size)
    ]
    return StepBatch(
        micro_batches=micro_batches,
        num_valid_targets=int(windows.target_mask.sum()),
        stage="synthetic",
        sources=["synthetic"] * per_rank,
    )
