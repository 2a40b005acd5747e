"""`nanotron-recipes data verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.next_line import command
from launch.cli.options import OverrideOption, RecipeArgument
from nanotron_recipes.errors import UserError

if TYPE_CHECKING:
    from data.verification import ExpectedFile
    from nanotron_recipes.recipe import Recipe
    from nanotron_recipes.schema.data import CorpusSource


def data_verify(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that hash; default: one a CPU.")] = None,
) -> None:
    """Hash every shard of a recipe and compare it with its manifest: a single changed bit is found.

    What was staged is hashed where it was staged to; of such a source, what the run reads.

    Exits with 1 where a file is damaged or missing, each named in a line on stdout, and says what brings it back; with
    2 where a source is.

    Examples:

    `nanotron-recipes data verify tiny`

    `nanotron-recipes data verify smollm3-3b --set variables.SMOLLM3_DATA=/nvme/smollm3 --workers 16`
    """
    from nanotron_recipes.loading import load_recipe
    from nanotron_recipes.machine import usable_cpus
    from nanotron_recipes.numbers import short_number

    loaded = load_recipe(recipe, overrides or []).recipe
    sources = _files_of(loaded)
    files = [file for of_source in sources.values() for file in of_source]
    problems = _problems(files, workers or usable_cpus())
    for path, problem in problems.items():
        print(f"{path}: {problem}")
    total, good = len(files), [file for file in files if str(file.path) not in problems]
    size = short_number(sum(file.size for file in good))
    print(f"{len(good)} of {total} files ({size} bytes) are as they were written")
    if problems:
        given = [recipe, *(word for override in overrides or [] for word in ("--set", override))]
        print(f"next: {_remedy(loaded, sources, problems, given)}")
        raise typer.Exit(1)


def _remedy(recipe: Recipe, sources: dict[str, list[ExpectedFile]], problems: dict[str, str], given: list[str]) -> str:
    """The commands that bring damaged files back; a person gives them, since they delete.

    They delete nothing that cannot be made or copied again.
    """
    from data.places import place_of

    staged: list[str] = []
    made: list[str] = []
    foreign: list[str] = []
    steps: list[str] = []
    for name, files in sources.items():
        damaged = [str(file.path) for file in files if str(file.path) in problems]
        place, source = place_of(recipe, name), _tokenized_source(recipe, name)
        if damaged and place.copy is not None:
            staged += damaged
        elif damaged and source is None:
            foreign.append(str(place.folder))
        elif damaged and source is not None and _has_text(source):
            made.append(str(place.folder))
        elif damaged and recipe.corpus is not None and recipe.corpus.upload_to is not None:
            upload = recipe.corpus.upload_to.rstrip("/")
            steps.append(f"bring {place.folder} again from {upload}/{name} (its text is gone)")
        elif damaged:
            foreign.append(str(place.folder))
    if foreign:
        steps.append(f"bring {', '.join(foreign)} again from where it was made")
    if made:
        steps.append(f"{command('rm', '-r', *made)} && {command('nanotron-recipes', 'tokenize', *given)}")
    if staged:
        steps.append(f"{command('rm', '-f', *staged)} && {command('nanotron-recipes', 'data', 'stage', *given)}")
    return "; ".join(steps)


def _tokenized_source(recipe: Recipe, name: str) -> CorpusSource | None:
    """The source of the corpus that an entry of dataset_folder names, where `tokenize` made its shards."""
    from data.corpus_folder import made_before, made_by_tokenize

    corpus = recipe.corpus
    source = next((each for each in corpus.sources if each.name == name), None) if corpus is not None else None
    if corpus is None or source is None:
        return None
    manifest = made_before(corpus, source)
    return source if manifest is not None and made_by_tokenize(Path(corpus.path, name), manifest) else None


def _has_text(source: CorpusSource) -> bool:
    """Whether `tokenize` finds a source's text, as far as can be seen without reading it."""
    from data.text_files import inputs_of

    try:
        inputs_of(source)
    except UserError:
        return False
    return True


def _files_of(recipe: Recipe) -> dict[str, list[ExpectedFile]]:
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
    files = {}
    for name, manifest in manifests.items():
        staged, chosen = copies[name], None
        if staged is not None:
            here = [number for number, file in enumerate(manifest.train.files) if file.name in staged.files]
            chosen = {*read[name], *here}
        files[name] = expected_files(source_path(recipe, name), manifest, chosen)
    return files


def _problems(files: list[ExpectedFile], workers: int) -> dict[str, str]:
    """Hash all files, with progress on a terminal; the largest first, so that no thread is left with one at the end.

    Returns:
        For each path of a file that is not as it was written, why.
    """
    from concurrent.futures import ThreadPoolExecutor

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from data.verification import file_problem

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        task = progress.add_task("", total=sum(file.size for file in files))
        in_order = sorted(files, key=lambda file: -file.size)
        found = pool.map(lambda file: file_problem(file, lambda count: progress.advance(task, count)), in_order)
        return {str(file.path): problem for file, problem in zip(in_order, found, strict=True) if problem}
