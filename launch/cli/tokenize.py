"""`nanotron-recipes tokenize`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launch.cli.next_line import command
from launch.cli.options import OverrideOption, RecipeArgument
from nanotron_recipes.errors import UserError

if TYPE_CHECKING:
    from nanotron_recipes.loading import LoadedRecipe


def tokenize(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that encode on each node; default: one a CPU.")
    ] = None,
    launcher: Annotated[
        Literal["local", "slurm", "srun"],
        typer.Option(help="slurm: submit a job; srun: on all nodes of the job that this is called in."),
    ] = "local",
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of the job, which share the work.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job's script; nothing is submitted.")] = False,
) -> None:
    """Turn a recipe's corpus into a tokenizer and shards; called again, it goes on where it stopped.

    Examples:

    `nanotron-recipes tokenize tiny`

    `nanotron-recipes tokenize my-recipe.yaml --set corpus.path=/nvme/corpora/mine --workers 16`

    `nanotron-recipes tokenize my-recipe.yaml --launcher slurm --nodes 4`
    """
    from rich.console import Console

    from data.tokenization import tokenize as make_shards
    from data.tokenization_process import TokenizationFailed
    from launch.cluster.slurm import on_all_nodes
    from nanotron_recipes.loading import load_recipe
    from nanotron_recipes.variables import require_variables

    loaded = load_recipe(recipe, overrides or [])
    if launcher != "slurm" and (nodes is not None or dry_run):
        raise UserError(
            f"--{'dry-run' if dry_run else 'nodes'}: is about a Slurm job; expected --launcher slurm with it"
        )
    if launcher == "slurm":
        _submit(loaded, nodes or 1, workers, dry_run=dry_run)
        return
    require_variables(loaded.recipe)
    try:
        starter = on_all_nodes() if launcher == "srun" else []
        make_shards(loaded.recipe, recipe, workers=workers, console=Console(), starter=starter)
        changes = [part for override in overrides or [] for part in ("--set", override)]
        print(f"next: {command('nanotron-recipes', 'pretrain', recipe, *changes)}")
    except TokenizationFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _submit(loaded: LoadedRecipe, nodes: int, workers: int | None, *, dry_run: bool) -> None:
    from launch.cluster.tokenization_job import script_for, submit_tokenization

    if dry_run:
        print(script_for(loaded, nodes, workers), end="")
        return
    for line in submit_tokenization(loaded, nodes, workers):
        print(line)
