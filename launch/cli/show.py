"""`nanotron-recipes show`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from launch.cli.options import OverrideOption, RecipeArgument
from model.arithmetic import num_parameters
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe
from nanotron_recipes.numbers import short_number
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schedule import Phase, learning_rate_phases, stage_boundaries
from nanotron_recipes.sequences import stage_sequence_length, tokens_through
from nanotron_recipes.topology import global_batch_size, local_world_size, resolve_topology


def show(recipe: RecipeArgument, overrides: OverrideOption = None) -> None:
    """Print a recipe with every key that has an effect (stdout), and what follows from it (stderr).

    Example: `nanotron-recipes show tiny --set tokens.train_steps=200`
    """
    loaded = load_recipe(recipe, overrides or [])
    print(dump_yaml(loaded.recipe, encoding=sys.stdout.encoding or "utf-8"), end="", flush=True)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    for fact in derived_facts(loaded.recipe):
        print(fact, file=sys.stderr)


def derived_facts(recipe: Recipe) -> Iterator[str]:
    """Yield lines about what the recipe amounts to on one node: size, batch, tokens, learning rate, stages."""
    batch, sequence, steps = global_batch_size(recipe), recipe.tokens.sequence_length, recipe.tokens.train_steps
    step_tokens = batch * sequence
    yield f"parameters: {num_parameters(recipe):,}"
    yield (
        f"batch: {batch} sequences of {sequence:,} = {step_tokens:,} tokens a step, "
        f"{short_number(tokens_through(recipe, steps))} in {steps:,} steps"
    )
    yield f"ranks on one node: {_one_node(recipe)}"
    for phase in learning_rate_phases(recipe):
        if phase.first < steps:
            yield f"learning rate: {_describe(phase, steps)}"
    for stage, (first, end) in zip(recipe.data_stages, stage_boundaries(recipe), strict=True):
        if first < end:
            length = stage_sequence_length(recipe, stage)
            tokens = short_number((end - first) * batch * length)
            sequences = f" in sequences of {length:,}" if length != sequence else ""
            yield f"stage {stage.name!r}: steps {first:,} to {end - 1:,}, {tokens} tokens{sequences}"


def _one_node(recipe: Recipe) -> str:
    try:
        topology = resolve_topology(recipe, local_world_size(recipe, recipe.slurm.gpus_per_node or None))
    except UserError as error:
        return f"do not fit: {error}"
    grid = f"dp {topology.dp} × pp {topology.pp} × tp {topology.tp}" + (
        f" × cp {topology.cp}" if topology.cp > 1 else ""
    )
    cut = f"{topology.num_micro_batches} of {topology.micro_batch_size}"
    return f"{topology.world_size} = {grid}; micro-batches of each replica: {cut}"


def _describe(phase: Phase, steps: int) -> str:
    last = steps if phase.end is None else min(phase.end, steps)
    where = f"steps {phase.first + 1:,} to {last:,}"
    if phase.shape == "constant":
        return f"{where}: {phase.rate:g}"
    return f"{where}: {phase.shape} from {phase.rate_at(phase.first):g} to {phase.rate_at(last - 1):.3g}"
