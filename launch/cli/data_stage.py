"""`nanotron-recipes data stage`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import typer

from launch.cli.next_line import command
from launch.cli.options import OverrideOption, RecipeArgument

if TYPE_CHECKING:
    from rich.console import Console

    from data.staging import Staging
    from nanotron_recipes.recipe import Recipe


def data_stage(recipe: RecipeArgument, overrides: OverrideOption = None) -> None:
    """Copy what a run reads to this machine's own disk, from S3 or a shared file system; to be called on every node.

    Where the copies lie is said by dataset_read_path or data_staging.path. Only shards that some step reads are copied,
    each is hashed on the way. Called again after whatever ended it, it goes on; copies that are there are only looked
    at. Exits with 2 where a source is missing, damaged or too large for the disk, with 1 where the network or the disk
    gives up.

    Examples:

    `nanotron-recipes data stage smollm3-3b --set variables.SMOLLM3_DATA=s3://b/smollm3 --set data_staging.path=/nvme`

    `nanotron-recipes data stage mine.yaml --set data_staging.endpoint_url=https://s3.example.com`
    """
    from rich.console import Console

    from nanotron_recipes.loading import load_recipe

    console = Console(soft_wrap=True, highlight=False, markup=False)
    stage_recipe(load_recipe(recipe, overrides or []).recipe, console)
    following = [part for override in overrides or [] for part in ("--set", override)]
    console.print(f"next: {command('nanotron-recipes', 'pretrain', recipe, *following)}")


def stage_recipe(recipe: Recipe, console: Console) -> None:
    """Stage what a run of the recipe reads, with progress; says what was done. Exits with 1 where it fails."""
    from data.staging import StagingFailed, plan_staging, stage
    from data.transfer import TransferFailed, Watch
    from launch.cli.transfer_progress import transfer_progress

    def note(line: str) -> None:
        console.print(f"note: {line}", markup=False, highlight=False)

    begun = time.monotonic()
    try:
        staging = plan_staging(recipe, Watch(note=note))
        _say_plan(staging, console)
        with transfer_progress(staging.bytes_to_stage) as advance:
            stage(recipe, staging, Watch(advance, note))
    except (StagingFailed, TransferFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    _say_done(staging, time.monotonic() - begun, console)


def _say_plan(staging: Staging, console: Console) -> None:
    from nanotron_recipes.numbers import short_number

    sources = staging.sources
    if not sources:
        console.print(
            "nothing to stage: every source is read where it is (see data_staging.path, dataset_read_path)",
            highlight=False,
        )
        return
    read = sum(file.size for source in sources for file in source.files)
    whole = sum(source.all_bytes for source in sources)
    console.print(
        f"{len(sources)} {'source' if len(sources) == 1 else 'sources'}: {short_number(whole)} bytes, of which the run "
        f"reads files of {short_number(read)}; to be staged: {short_number(staging.bytes_to_stage)}",
        highlight=False,
    )


def _say_done(staging: Staging, seconds: float, console: Console) -> None:
    from nanotron_recipes.numbers import short_number

    if not staging.sources:
        return
    new = sum(len(source.missing) for source in staging.sources)
    there = sum(len(source.staged) for source in staging.sources)
    rate = short_number(staging.bytes_to_stage / max(seconds, 1e-3))
    console.print(
        f"staged: {new} files of {short_number(staging.bytes_to_stage)} bytes in {seconds:.1f} s ({rate} bytes/s); "
        f"{there} were there",
        highlight=False,
    )
