"""`nanotron-recipes data verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.options import OverrideOption, RecipeArgument

if TYPE_CHECKING:
    from data.verification import ExpectedFile
    from nanotron_recipes.recipe import Recipe


def data_verify(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that hash; default: one a CPU.")] = None,
) -> None:
    """Hash every shard of a recipe and compare it with its manifest: a single changed bit is found.

    What was staged is hashed where it was staged to; of such a source, what the run reads.

    Exits with 1 where a file is damaged or missing, each named in a line on stdout; with 2 where a source is.

    Examples:

    `nanotron-recipes data verify tiny`

    `nanotron-recipes data verify smollm3-3b --set variables.SMOLLM3_DATA=/nvme/smollm3 --workers 16`
    """
    from nanotron_recipes.loading import load_recipe
    from nanotron_recipes.machine import usable_cpus
    from nanotron_recipes.numbers import short_number

    files = _files_of(load_recipe(recipe, overrides or []).recipe)
    problems = _problems(files, workers or usable_cpus())
    for path, problem in problems:
        print(f"{path}: {problem}")
    total = short_number(sum(file.size for file in files))
    print(f"{len(files) - len(problems)} of {len(files)} files ({total} bytes) are as they were written")
    if problems:
        raise typer.Exit(1)


def _files_of(recipe: Recipe) -> list[ExpectedFile]:
    """Every file of every source; of what was staged, what is here and what the run reads."""
    from data.places import source_path
    from data.readings import files_read
    from data.sources import read_source_manifests
    from data.staged import read_staged
    from data.verification import expected_files
    from nanotron_recipes.variables import require_variables

    require_variables(recipe)
    manifests = read_source_manifests(recipe)
    copies = {name: read_staged(source_path(recipe, name)) for name in manifests}
    read = files_read(recipe, {name: manifests[name] for name, staged in copies.items() if staged is not None})
    files = []
    for name, manifest in manifests.items():
        staged, chosen = copies[name], None
        if staged is not None:
            here = [number for number, file in enumerate(manifest.train.files) if file.name in staged.files]
            chosen = {*read[name], *here}
        files += expected_files(source_path(recipe, name), manifest, chosen)
    return files


def _problems(files: list[ExpectedFile], workers: int) -> list[tuple[str, str]]:
    """Hash all files, with progress on a terminal; the largest first, so that no thread is left with one at the end."""
    from concurrent.futures import ThreadPoolExecutor

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from data.verification import file_problem

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        task = progress.add_task("", total=sum(file.size for file in files))
        in_order = sorted(files, key=lambda file: -file.size)
        found = pool.map(lambda file: file_problem(file, lambda count: progress.advance(task, count)), in_order)
        return [(str(file.path), problem) for file, problem in zip(in_order, found, strict=True) if problem]
