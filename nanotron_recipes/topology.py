"""Which ranks train what: dp, pp, tp, and how the global batch is cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from nanotron_recipes.errors import UserError, user_error
from nanotron_recipes.recipe import Recipe

MAX_SIZE = 1_000_000_000
"""Largest batch, width, or number of ranks that is thought about."""


@dataclass(frozen=True)
class Topology:
    """A resolved grid of ranks and the cut of a step's batch; sizes of batches are in sequences."""

    dp: int
    pp: int
    tp: int
    micro_batch_size: int
    num_micro_batches: int
    """Micro-batches of one replica in one step."""
    global_batch_size: int
    cp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.dp * self.ranks_per_replica

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.pp * self.tp * self.cp


def padded_vocab_size(recipe: Recipe) -> int:
    """Return the rows of the embedding: the vocabulary, padded to a multiple of `make_vocab_size_divisible_by`."""
    return next_multiple(recipe.model.architecture.vocab_size, recipe.model.make_vocab_size_divisible_by)


def next_multiple(number: int, divisor: int) -> int:
    """Return the smallest multiple of `divisor` that is not below `number`."""
    return -(-number // divisor) * divisor


def global_batch_size(recipe: Recipe) -> int:
    """Return the sequences of one step: `tokens.global_batch_size`, else the product of the file's own dp,
    micro_batch_size and batch_accumulation_per_replica. Raises UserError where neither is there."""
    tokens, dp = recipe.tokens, recipe.parallelism.dp
    if tokens.global_batch_size is not None:
        return tokens.global_batch_size
    accumulation = tokens.batch_accumulation_per_replica
    if accumulation is None or dp == "auto" or tokens.micro_batch_size == "auto":
        raise user_error(
            "expected a number of sequences; without it dp, micro_batch_size and batch_accumulation_per_replica must "
            "all be numbers",
            key="tokens.global_batch_size",
            value=None,
        )
    return dp * tokens.micro_batch_size * accumulation


def local_world_size(recipe: Recipe, ranks_per_node: int | None = None, nodes: int = 1) -> int:
    """Return how many ranks to start on `nodes` nodes of `ranks_per_node` each (null: `general.cpu_ranks_per_node`).

    A number in `parallelism.dp` decides alone; dp auto takes as many whole replicas as fit, at least one.
    """
    replica = _ranks_per_replica(recipe)
    if recipe.parallelism.dp != "auto":
        return recipe.parallelism.dp * replica
    ranks = nodes * (recipe.general.cpu_ranks_per_node if ranks_per_node is None else ranks_per_node)
    return max(1, ranks // replica) * replica


def largest_world_size(recipe: Recipe, at_most: int) -> int:
    """Return the most ranks up to `at_most` that dp auto can be resolved for; `at_most` where there are none, or where
    dp is a number."""
    if recipe.parallelism.dp == "auto":
        for num_ranks in range(at_most, 0, -_ranks_per_replica(recipe)):
            with suppress(UserError):
                return resolve_topology(recipe, num_ranks).world_size
    return at_most


def resolve_topology(recipe: Recipe, world_size: int | None = None) -> Topology:
    """Return the grid for `world_size` ranks; null means those that the recipe names, with one replica for dp auto.

    Raises UserError where the ranks are not dp·pp·tp, where the batch does not divide, or where 1F1B has too few
    micro-batches.
    """
    parallelism = recipe.parallelism
    dp = _data_parallel_size(recipe, world_size)
    batch = global_batch_size(recipe)
    if batch > MAX_SIZE:
        raise user_error(f"expected at most {MAX_SIZE:,} sequences", key="tokens.global_batch_size", value=batch)
    if batch % dp:
        raise user_error(
            f"expected a multiple of dp {dp} (dp may be {_listing(divisors(batch))})",
            key="tokens.global_batch_size",
            value=batch,
        )
    micro_batch_size = _micro_batch_size(recipe, batch, dp)
    micro_batches = batch // dp // micro_batch_size
    accumulation = recipe.tokens.batch_accumulation_per_replica
    if accumulation is not None and accumulation != micro_batches:
        raise user_error(
            f"expected {micro_batches}: global_batch_size {batch} = dp {dp} × micro_batch_size {micro_batch_size} × "
            f"{micro_batches} (or leave it out)",
            key="tokens.batch_accumulation_per_replica",
            value=accumulation,
        )
    if parallelism.pp_engine == "1f1b" and micro_batches < parallelism.pp - 1:
        raise user_error(
            f"1f1b needs at least pp − 1 = {parallelism.pp - 1} micro-batches and gets {micro_batches} "
            f"(global_batch_size {batch} / dp {dp} / micro_batch_size {micro_batch_size}); lower pp or the "
            "micro-batch, or use afab",
            key="parallelism.pp",
            value=parallelism.pp,
        )
    return Topology(
        dp, parallelism.pp, parallelism.tp, micro_batch_size, micro_batches, batch, parallelism.context_parallel_size
    )


def with_data_parallel(recipe: Recipe, dp: int) -> Recipe:
    """Return the recipe at another dp with the same global batch: the accumulation is left to be derived."""
    tokens = {"global_batch_size": global_batch_size(recipe), "batch_accumulation_per_replica": None}
    return recipe.model_copy(
        update={
            "parallelism": recipe.parallelism.model_copy(update={"dp": dp}),
            "tokens": recipe.tokens.model_copy(update=tokens),
        }
    )


def divisors(number: int) -> list[int]:
    """Return all divisors of a positive number in rising order."""
    small = [candidate for candidate in range(1, int(number**0.5) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


def _ranks_per_replica(recipe: Recipe) -> int:
    parallelism = recipe.parallelism
    return parallelism.pp * parallelism.tp * parallelism.context_parallel_size


def _data_parallel_size(recipe: Recipe, world_size: int | None) -> int:
    dp, replica = recipe.parallelism.dp, _ranks_per_replica(recipe)
    if world_size is None:
        return dp if dp != "auto" else _implied_data_parallel_size(recipe)
    if dp == "auto":
        if world_size % replica:
            raise user_error(
                f"expected a divisor of the {world_size} ranks for pp × tp (× context_parallel_size), not {replica}",
                key="parallelism.dp",
                value=dp,
            )
        return world_size // replica
    if dp * replica != world_size:
        raise user_error(
            f"dp × pp × tp (× context_parallel_size) = {dp * replica} ranks, and {world_size} were started",
            key="parallelism.dp",
            value=dp,
        )
    return dp


def _implied_data_parallel_size(recipe: Recipe) -> int:
    """Return the dp that a batch, a micro-batch and an accumulation which are all given leave; else 1."""
    size, accumulation = recipe.tokens.micro_batch_size, recipe.tokens.batch_accumulation_per_replica
    if size == "auto" or accumulation is None:
        return 1
    return max(1, global_batch_size(recipe) // (size * accumulation))


def _micro_batch_size(recipe: Recipe, batch: int, dp: int) -> int:
    size, replica_batch = recipe.tokens.micro_batch_size, batch // dp
    if size == "auto":
        accumulation = recipe.tokens.batch_accumulation_per_replica
        if accumulation is not None and replica_batch % accumulation == 0:
            return replica_batch // accumulation
        return max(_sizes_that_fill(replica_batch, recipe.parallelism.pp), default=1)
    if replica_batch % size:
        raise user_error(
            f"expected a divisor of a replica's {replica_batch} sequences (global_batch_size {batch} / dp {dp}): "
            f"{_listing(divisors(replica_batch))}",
            key="tokens.micro_batch_size",
            value=size,
        )
    return size


def _sizes_that_fill(replica_batch: int, pp: int) -> Iterator[int]:
    """Yield the micro-batch sizes that leave the pipeline at least one micro-batch per stage."""
    return (size for size in divisors(replica_batch) if replica_batch // size >= pp)


def _listing(numbers: list[int], limit: int = 12) -> str:
    shown = ", ".join(map(str, numbers[:limit]))
    return f"{shown}, …" if len(numbers) > limit else shown
