"""`nanotron-recipes data plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.options import OverrideOption, RecipeArgument
from nanotron_recipes.errors import UserError

if TYPE_CHECKING:
    from data.coverage import Coverage
    from nanotron_recipes.recipe import Recipe

MANY_EPOCHS = 4
"""Up to about so many epochs repeated text teaches almost as much as new text (Muennighoff et al. 2023)."""


def data_plan(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture to draw (.png, .svg, .pdf); default: no picture.")
    ] = None,
) -> None:
    """Show what a run reads of every source: tokens in each stage, and how often the source has been read at the end.

    Only the manifests of the sources are looked at. Where there is none, the epochs are not known.

    Examples:

    `nanotron-recipes data plan tiny`

    `nanotron-recipes data plan smollm3-3b --plot data.png`
    """
    from data.coverage import coverage
    from data.manifest import MANIFEST_NAME, read_manifest
    from data.places import place_of
    from nanotron_recipes.loading import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    names = [name for stage in loaded.recipe.data_stages for name in stage.data.dataset.dataset_folder]
    if not names:
        raise UserError(f"{loaded.path.name}: data_stages: expected at least one stage to read")
    places = [place_of(loaded.recipe, name) for name in dict.fromkeys(names)]
    folders = {place.name: place.copy or Path(place.origin) for place in places}
    found = {name: folder for name, folder in folders.items() if (folder / MANIFEST_NAME).is_file()}
    lines = coverage(loaded.recipe, {name: read_manifest(folder).train.tokens for name, folder in found.items()})
    _print_notes(loaded.notes)
    _print_table(loaded.recipe, lines)
    _print_remarks(lines, len(folders) - len(found))
    if plot is not None:
        from launch.plan.coverage_plot import plot_coverage

        plot_coverage(lines, plot)
        print(f"written to {plot}")


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        if "dataset_weights" in note or note.startswith("variables."):
            print(f"warning: {note}")


def _print_table(recipe: Recipe, lines: list[Coverage]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from launch.plan.source_names import short_names
    from nanotron_recipes.numbers import short_number

    stages = [stage.name for stage in recipe.data_stages]
    totals = [sum(line.tokens for line in lines if line.stage == stage) for stage in stages]
    table = Table("source", show_footer=True)
    table.columns[0].footer = "all"
    for heading, footer in [*zip(stages, totals, strict=True), ("tokens", sum(totals))]:
        table.add_column(heading, footer=short_number(footer), justify="right")
    table.add_column("epochs", justify="right")
    names = short_names(line.source for line in lines)
    for name, mine in by_source(lines).items():
        tokens = {line.stage: line.tokens for line in mine}
        cells = [short_number(tokens[stage]) if stage in tokens else "" for stage in stages]
        epochs = mine[-1].epochs
        last = "not known" if epochs is None else f"{epochs:.2f}"
        table.add_row(Text(names[name]), *cells, short_number(sum(tokens.values())), last)
    Console().print(table)


def _print_remarks(lines: list[Coverage], num_unknown: int) -> None:
    for name, mine in by_source(lines).items():
        epochs = mine[-1].epochs
        if epochs is not None and epochs > MANY_EPOCHS:
            print(f"warning: {name} is read {epochs:.1f} times; more than {MANY_EPOCHS} times teach ever less")
    if num_unknown:
        print(f"note: {num_unknown} sources have no manifest yet: how often they are read is not known")


def by_source(lines: list[Coverage]) -> dict[str, list[Coverage]]:
    """Return the lines of each source in the order of the stages, sources in that of their first use."""
    found: dict[str, list[Coverage]] = {}
    for line in lines:
        found.setdefault(line.source, []).append(line)
    return found
