"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe (see `list`) or the path of a YAML file.")
]
"""The recipe of a command."""

OverrideOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as tokens.train_steps=100. May be repeated."),
]
"""Changes to the recipe."""
