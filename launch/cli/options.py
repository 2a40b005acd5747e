"""Arguments that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def local_path(text: str) -> Path:
    """Return the file or folder of this machine that an argument names: for it, as for a recipe's paths, `~` is a home
    folder and a URL a mistake, which is what Path would make a folder of."""
    from nanotron_recipes.errors import show_value
    from nanotron_recipes.paths import path_mistake

    path = os.path.expanduser(text)
    mistake = path_mistake(path)
    if mistake:  # a UserError is a ValueError, of which typer keeps no word
        raise typer.BadParameter(f"{show_value(text)}: {mistake}")
    return Path(path)


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe (see `list`) or the path of a YAML file.")
]
"""The recipe of a command."""

OverrideOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as tokens.train_steps=100. May be repeated."),
]
"""Changes to the recipe."""
