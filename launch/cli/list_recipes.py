"""`nanotron-recipes list`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from model.arithmetic import num_parameters
from nanotron_recipes.loading import load_recipe, shipped_recipes
from nanotron_recipes.numbers import short_number
from nanotron_recipes.sequences import tokens_through


def list_recipes() -> None:
    """List the recipes that come with the code.

    Example: `nanotron-recipes list`
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("purpose", overflow="fold")
    for name in shipped_recipes():
        recipe = load_recipe(name).recipe
        tokens = tokens_through(recipe, recipe.tokens.train_steps)
        table.add_row(name, short_number(num_parameters(recipe)), short_number(tokens), recipe.general.purpose)
    Console().print(table)
