"""Synthetic batches whose sequences get longer, as they do from one data stage to the next; importable on ranks."""

from data.batch import StepBatch
from launch.train.synthetic import synthetic_batch
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.topology import Topology


def growing_batch(recipe: Recipe, topology: Topology, step: int, dp_rank: int) -> StepBatch:
    """Steps 1 and 2 have sequences of the recipe's length, later ones are twice as long."""
    length = recipe.tokens.sequence_length * (1 if step < 3 else 2)
    tokens = recipe.tokens.model_copy(update={"sequence_length": length})
    return synthetic_batch(recipe.model_copy(update={"tokens": tokens}), topology, step, dp_rank)
