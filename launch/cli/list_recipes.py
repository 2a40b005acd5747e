"""`nanotron-recipes list`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from model.arithmetic import num_parameters
from nanotron_recipes.loading import load_recipe, shipped_recipes
from nanotron_recipes.numbers import short_number
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import tokens_through
from nanotron_recipes.variables import unset_variables


def list_recipes() -> None:
    """List the recipes that come with the code.

    Example: `nanotron-recipes list`
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("needs", no_wrap=True)
    table.add_column("purpose", overflow="fold")
    for name in shipped_recipes():
        recipe = load_recipe(name).recipe
        tokens = tokens_through(recipe, recipe.tokens.train_steps)
        parameters = short_number(num_parameters(recipe))
        table.add_row(name, parameters, short_number(tokens), _needs(recipe), recipe.general.purpose)
    Console().print(table)


def _needs(recipe: Recipe) -> str:
    """What a recipe cannot be trained without, and does not bring along."""
    has_network = recipe.corpus is not None and any(source.needs_network for source in recipe.corpus.sources)
    missing = {
        "data_stages": not recipe.data_stages,
        "its data": bool(unset_variables(recipe)),
        "a tokenizer": recipe.tokenizer.train is None,
        "the network": has_network,
    }
    return ", ".join(name for name, is_missing in missing.items() if is_missing) or "nothing"
