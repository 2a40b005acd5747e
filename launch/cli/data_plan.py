"""`nanotron-recipes data plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.options import OverrideOption, RecipeArgument, local_path
from nanotron_recipes.errors import UserError

if TYPE_CHECKING:
    from data.coverage import Coverage
    from nanotron_recipes.recipe import Recipe


def data_plan(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", parser=local_path, help="Picture to draw (.png, .svg, .pdf); default: no picture."
        ),
    ] = None,
) -> None:
    """Show what a run reads of every source: tokens in each stage, and how often all of it has been read at the end.

    *has* is what there is of a source to train on, *epochs* how many times the run reads that. Only the manifests of
    the sources are looked at; without one neither is known.

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
    sizes = {name: read_manifest(folder).train.tokens for name, folder in found.items()}
    lines = coverage(loaded.recipe, sizes)
    _print_notes(loaded.notes)
    _print_table(loaded.recipe, lines, sizes)
    _print_remarks(lines, [str(folder) for name, folder in folders.items() if name not in found])
    if plot is not None:
        from launch.plan.coverage_plot import plot_coverage

        plot_coverage(lines, plot)
        print(f"written to {plot}")


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        if note.startswith(("data_stages", "data_skipped_ranges", "variables.")):
            print(f"warning: {note}")


def _print_table(recipe: Recipe, lines: list[Coverage], sizes: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from data.repetition import epochs_of
    from nanotron_recipes.numbers import short_number
    from nanotron_recipes.sequences import stage_sequence_length
    from nanotron_recipes.source_names import short_names
    from nanotron_recipes.topology import global_batch_size

    stages = [stage.name for stage in recipe.data_stages]
    totals = [sum(line.tokens for line in lines if line.number == number) for number in range(len(stages))]
    batch, all_tokens = global_batch_size(recipe), short_number(sum(totals))
    print(f"{recipe.tokens.train_steps:,} steps of {batch:,} sequences, {all_tokens} tokens")
    for stage in recipe.data_stages:
        length = stage_sequence_length(recipe, stage)
        print(f"  from step {stage.start_training_step:,}: {stage.name}, sequences of {length:,} tokens")
    table = Table("source", show_footer=True)
    table.columns[0].footer = "all"
    for heading, footer in [*zip(stages, totals, strict=True), ("all stages", sum(totals))]:
        table.add_column(Text(heading), footer=short_number(footer), justify="right")
    for heading in ("has", "epochs") if sizes else ():
        table.add_column(heading, justify="right")
    names, epochs = short_names(line.source for line in lines), epochs_of(lines)
    for name, mine in by_source(lines).items():
        tokens = {line.number: line.tokens for line in mine}
        cells = [short_number(tokens[number]) if number in tokens else "" for number in range(len(stages))]
        often, size = epochs[name], sizes.get(name)
        known = ["?" if size is None else short_number(size), "?" if often is None else f"{often:.2f}"]
        table.add_row(Text(names[name]), *cells, short_number(sum(tokens.values())), *(known if sizes else ()))
    Console().print(table)


def _print_remarks(lines: list[Coverage], unknown: list[str]) -> None:
    from data.repetition import MANY_EPOCHS, epochs_of

    for name, often in epochs_of(lines).items():
        if often is not None and often > MANY_EPOCHS:
            print(f"warning: {name}: all is read {often:.1f} times; after {MANY_EPOCHS:g} times it teaches ever less")
    if unknown:
        which = "1 source has" if len(unknown) == 1 else f"{len(unknown)} sources have"
        where = f"{unknown[0]}{' and so on' if len(unknown) > 1 else ''}"
        print(f"note: {which} no manifest here, so that their epochs are not known; looked in {where}")


def by_source(lines: list[Coverage]) -> dict[str, list[Coverage]]:
    """Return the lines of each source in the order of the stages, sources in that of their first use."""
    found: dict[str, list[Coverage]] = {}
    for line in lines:
        found.setdefault(line.source, []).append(line)
    return found
