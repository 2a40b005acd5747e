"""`nanotron-recipes validate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from launch.cli.options import OverrideOption
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.numbers import counted


def validate(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE…", help="Shipped recipes or paths of YAML files.")],
    overrides: OverrideOption = None,
) -> None:
    """Check recipes without starting anything; data and tokenizer are looked at by `pretrain`.

    Notes say which keys have no effect here. Exits with 2 where a recipe is wrong, after looking at all of them.

    Example: `nanotron-recipes validate tiny my-recipe.yaml --set parallelism.tp=2`
    """
    failed = False
    for name in recipes:
        try:
            loaded = load_recipe(name, overrides or [])
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"OK {name}" + (f" ({counted(len(loaded.notes), 'note')})" if loaded.notes else ""))
        for note in loaded.notes:
            print(f"  note: {note}")
    if failed:
        raise typer.Exit(2)
