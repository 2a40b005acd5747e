"""`nanotron-recipes show`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from launch.cli.options import OverrideOption, RecipeArgument
from model.arithmetic import num_parameters
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe
from nanotron_recipes.numbers import counted, short_number
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schedule import Phase, learning_rate_phases, stage_boundaries
from nanotron_recipes.sequences import stage_sequence_length, tokens_through
from nanotron_recipes.topology import global_batch_size, local_world_size, resolve_topology


def show(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Say which ranks a job on so many nodes has.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="GPUs of a node, 0 on CPUs; default: slurm.gpus_per_node.")
    ] = None,
) -> None:
    """Print a recipe with every key that has an effect (stdout; of slurm, those it has), and what follows (stderr).

    Examples:

    `nanotron-recipes show tiny --set tokens.train_steps=200`

    `nanotron-recipes show smollm3-3b --nodes 48 --gpus-per-node 8`
    """
    loaded = load_recipe(recipe, overrides or [])
    on_nodes = loaded.recipe
    if nodes is not None or gpus_per_node is not None:
        on_nodes = _for_nodes(loaded.recipe, nodes or 1, gpus_per_node)
    print(dump_yaml(loaded.recipe, encoding=sys.stdout.encoding or "utf-8"), end="", flush=True)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    for fact in derived_facts(on_nodes, nodes or 1):
        print(fact, file=sys.stderr)


def _for_nodes(recipe: Recipe, nodes: int, gpus_per_node: int | None) -> Recipe:
    """The recipe as a job has it. Raises UserError where it would be refused on these nodes."""
    from launch.cluster.submit import ranks_on_each_node
    from nanotron_recipes.cluster_profiles import job_resources

    resources, _ = job_resources(recipe)
    if gpus_per_node is not None:
        resources = resources.model_copy(update={"gpus_per_node": gpus_per_node})
    recipe = recipe.model_copy(update={"slurm": resources})
    ranks_on_each_node(recipe, nodes)
    return recipe


def derived_facts(recipe: Recipe, nodes: int) -> Iterator[str]:
    """Yield lines about what the recipe amounts to on so many nodes: size, batch, tokens, learning rate, stages."""
    batch, sequence, steps = global_batch_size(recipe), recipe.tokens.sequence_length, recipe.tokens.train_steps
    step_tokens = batch * sequence
    yield f"parameters: {num_parameters(recipe):,}"
    yield (
        f"batch: {batch} sequences of {sequence:,} = {step_tokens:,} tokens a step, "
        f"{short_number(tokens_through(recipe, steps))} in {steps:,} steps"
    )
    gpus = recipe.slurm.gpus_per_node
    of_what = f"of {counted(gpus, 'GPU')}" if gpus else "without GPUs"
    yield f"ranks on {'one node' if nodes == 1 else f'{nodes} nodes'} {of_what}: {_ranks(recipe, nodes)}"
    for phase in learning_rate_phases(recipe):
        if phase.first < steps:
            yield f"learning rate: {_describe(phase, steps)}"
    for stage, (first, end) in zip(recipe.data_stages, stage_boundaries(recipe), strict=True):
        if first < end:
            length = stage_sequence_length(recipe, stage)
            tokens = short_number((end - first) * batch * length)
            sequences = f" in sequences of {length:,}" if length != sequence else ""
            yield f"stage {stage.name!r}: steps {first:,} to {end - 1:,}, {tokens} tokens{sequences}"


def _ranks(recipe: Recipe, nodes: int) -> str:
    try:
        topology = resolve_topology(recipe, local_world_size(recipe, recipe.slurm.gpus_per_node or None, nodes))
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
