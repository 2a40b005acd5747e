"""How far every source is read, stage by stage, and in which order: from manifests alone, without a shard in sight."""

from collections.abc import Mapping, Sequence

import numpy as np

from data.blocks import BlockOrder, Reading
from data.manifest import Manifest
from data.mixture import Mixture
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.data import DataStage
from nanotron_recipes.sequences import block_length, contiguous_length, stage_sequence_length
from nanotron_recipes.skipped import SkippedBatches
from nanotron_recipes.topology import global_batch_size

_AT_ONCE = 1 << 16
_LOOKED_AT = 1 << 22
"""Blocks of a source after which nearly every file that is read has been seen: what has not is taken to be read."""


def mixture_of(stage: DataStage) -> Mixture:
    """The mixture of a stage's weights. UserError where it makes no sense."""
    names = stage.data.dataset.dataset_folder
    weights = stage.data.dataset.dataset_weights or [1.0] * len(names)
    if len(set(names)) < len(names) or len(weights) != len(names) or sum(weights) <= 0:
        raise UserError(
            f"data_stages {stage.name}: expected different entries in dataset_folder, and a weight for each "
            "that is not negative, not all of them 0"
        )
    return Mixture.from_weights(weights)


def blocks_per_epoch(tokens: int, block: int) -> int:
    """Blocks of `block` tokens of a source with so many training tokens: all but the first token is a target, and the
    last block may leave up to a block less one."""
    return max(0, (tokens - 1) // block)


def blocks_before(recipe: Recipe, mixtures: Sequence[Mixture]) -> list[dict[str, int]]:
    """By stage, how many blocks each source gave before it, to skipped batches too."""
    starts = [entry.start_training_step for entry in recipe.data_stages]
    before: list[dict[str, int]] = [{}]
    for number, stop in enumerate(starts[1:]):
        before.append(_read_until(recipe, number, mixtures[number], before[number], stop))
    return before


def block_orders(
    recipe: Recipe, manifests: Mapping[str, Manifest], before: Sequence[dict[str, int]]
) -> dict[str, BlockOrder]:
    """By source, the order of its blocks; `before` is what blocks_before says."""
    block = block_length(recipe)
    readings: dict[str, list[Reading]] = {}
    seeds: dict[str, int] = {}
    for entry, read in zip(recipe.data_stages, before, strict=True):
        blocks = stage_sequence_length(recipe, entry) // block
        for name in entry.data.dataset.dataset_folder:
            readings.setdefault(name, []).append(Reading(read.get(name, 0), blocks))
            seeds.setdefault(name, entry.data.seed)
    stretch = contiguous_length(recipe) // block
    orders = {}
    for name, manifest in manifests.items():
        size = blocks_per_epoch(manifest.train.tokens, block)
        orders[name] = BlockOrder(size, seeds[name], manifest.fingerprint, stretch, tuple(readings[name]))
    return orders


def files_read(recipe: Recipe, manifests: Mapping[str, Manifest]) -> dict[str, list[int]]:
    """By source, the numbers of the training files that a run of the recipe reads from its first step to its last.

    A file counts where any block touches it. Blocks of skipped batches count, and of those that may yet be skipped for
    loss spikes; of a source of which millions of blocks are read, so do the few files that the first millions miss.
    """
    mixtures = [mixture_of(entry) for entry in recipe.data_stages]
    before = blocks_before(recipe, mixtures)
    end, last = _end_of_batches(recipe), len(recipe.data_stages) - 1
    while last and recipe.data_stages[last].start_training_step >= end:
        last -= 1
    read = _read_until(recipe, last, mixtures[last], before[last], end)
    orders, block = block_orders(recipe, manifests, before), block_length(recipe)
    return {name: _files(orders[name], read.get(name, 0), manifests[name], block) for name in manifests}


def _end_of_batches(recipe: Recipe) -> int:
    """The batch after the last one that a run may read, going back after as many loss spikes as it may."""
    guards = recipe.guards
    spare = guards.max_rewinds * (guards.rewind_skip_before + guards.rewind_skip_after)
    last = SkippedBatches.of(recipe).batch_of(recipe.tokens.train_steps)
    return last + 1 + (spare if guards.rewind_after_spike else 0)


def _read_until(recipe: Recipe, number: int, mixture: Mixture, before: dict[str, int], stop: int) -> dict[str, int]:
    """Blocks that each source gave before batch `stop` of stage `number`; `before` are those before the stage."""
    entry, read = recipe.data_stages[number], dict(before)
    blocks = stage_sequence_length(recipe, entry) // block_length(recipe)
    counts = mixture.counts((stop - entry.start_training_step) * global_batch_size(recipe))
    for name, count in zip(entry.data.dataset.dataset_folder, counts, strict=True):
        read[name] = read.get(name, 0) + count * blocks
    return read


def _files(order: BlockOrder, count: int, manifest: Manifest, block: int) -> list[int]:
    """The files with a token of the first `count` blocks; a block has one token more, its last target."""
    ends = np.cumsum([file.tokens for file in manifest.train.files], dtype=np.int64)
    reachable = int(np.searchsorted(ends, order.num_blocks * block, side="right")) + 1
    if count >= order.num_blocks:
        return list(range(reachable))
    # +1 where a stretch of files that are read begins, -1 after its end.
    changes = np.zeros(reachable + 1, dtype=np.int64)
    for first in range(0, count, _AT_ONCE):
        starts = order.blocks(np.arange(first, min(first + _AT_ONCE, count), dtype=np.int64)) * block
        np.add.at(changes, np.searchsorted(ends, starts, side="right"), 1)
        np.add.at(changes, np.searchsorted(ends, starts + block, side="right") + 1, -1)
        found = np.flatnonzero(np.cumsum(changes[:-1]))
        if len(found) == reachable or first > _LOOKED_AT:
            return list(range(reachable))
    return found.tolist() if count else []
