"""`nanotron-recipes tokenize`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from launch.cli.next_line import command
from launch.cli.options import OverrideOption, RecipeArgument


def tokenize(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that encode; default: one a CPU.")] = None,
) -> None:
    """Turn a recipe's corpus into a tokenizer and shards; called again, it goes on where it stopped.

    Examples:

    `nanotron-recipes tokenize tiny`

    `nanotron-recipes tokenize my-recipe.yaml --set corpus.path=/nvme/corpora/mine --workers 16`
    """
    from rich.console import Console

    from data.tokenization import tokenize as make_shards
    from data.tokenization_process import TokenizationFailed
    from nanotron_recipes.loading import load_recipe
    from nanotron_recipes.variables import require_variables

    loaded = load_recipe(recipe, overrides or [])
    require_variables(loaded.recipe)
    try:
        make_shards(loaded.recipe, recipe, workers=workers, console=Console())
        changes = [part for override in overrides or [] for part in ("--set", override)]
        print(f"next: {command('nanotron-recipes', 'pretrain', recipe, *changes)}")
    except TokenizationFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
