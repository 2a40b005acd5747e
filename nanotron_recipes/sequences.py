"""How long the sequences of each stage are, and what follows from it: blocks, tokens."""

from __future__ import annotations

from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schedule import stage_at
from nanotron_recipes.schema.data import DataStage
from nanotron_recipes.skipped import SkippedBatches
from nanotron_recipes.topology import global_batch_size


def stage_sequence_length(recipe: Recipe, stage: DataStage) -> int:
    """Return the tokens of a sequence in a stage: its own `sequence_length`, else that of `tokens`."""
    return recipe.tokens.sequence_length if stage.sequence_length is None else stage.sequence_length


def sequence_length_at(recipe: Recipe, step: int) -> int:
    """Return the tokens of a sequence in step `step` (from 1)."""
    if not recipe.data_stages:
        return _length(recipe)
    return stage_sequence_length(recipe, stage_at(recipe, step)[1])


def block_length(recipe: Recipe) -> int:
    """Return the tokens of a block, the unit of the order in which a source is read."""
    return _length(recipe) if recipe.tokens.block_length is None else recipe.tokens.block_length


def contiguous_length(recipe: Recipe) -> int:
    """Return the tokens that stay together in the order of blocks: `tokens.contiguous_length`, else the longest
    sequence of any stage."""
    if recipe.tokens.contiguous_length is not None:
        return recipe.tokens.contiguous_length
    lengths = [stage_sequence_length(recipe, stage) for stage in recipe.data_stages]
    return max([block_length(recipe), *lengths])


def tokens_through(recipe: Recipe, step: int) -> int:
    """Return the tokens that steps 1 to `step` train on."""
    if not recipe.data_stages:
        return step * global_batch_size(recipe) * _length(recipe)
    skipped, sequences = SkippedBatches.of(recipe), 0
    end = skipped.batch_of(step) + 1 if step else 1
    for number, stage in enumerate(recipe.data_stages):
        following = [entry.start_training_step for entry in recipe.data_stages[number + 1 :][:1]]
        for first, last in skipped.read_between(stage.start_training_step, min([end, *following])):
            sequences += (last - first) * stage_sequence_length(recipe, stage)
    return sequences * global_batch_size(recipe)


def _length(recipe: Recipe) -> int:
    return recipe.tokens.sequence_length
