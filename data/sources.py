"""The tokenized sources of a recipe: found, opened and checked against the recipe before anything starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data.manifest import MANIFEST_NAME, Manifest, read_manifest
from data.open_files import allow_open_files
from data.places import Place, place_of, source_names, source_path
from data.readings import blocks_per_epoch, files_read
from data.shards import ShardReader
from data.staged import NotStaged, StagedFolder, read_staged
from data.tokenizer import tokenizer_of
from data.verification import ExpectedFile, expected_files
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.data import Dataset
from nanotron_recipes.sequences import block_length
from nanotron_recipes.variables import require_variables


@dataclass(frozen=True)
class Source:
    """One source, open for reading, with the order of its training windows."""

    name: str
    """As the recipe calls it: an entry of dataset_folder."""
    folder: Path
    """Where its shards lie."""
    manifest: Manifest
    train: ShardReader
    validation: ShardReader
    seed: int
    """Seed of the order; the seed of the first stage that reads the source, so that later stages go on in it."""
    block_length: int
    """Tokens of a block. A window of S tokens has S + 1, the last of which is the next window's first."""

    @property
    def blocks_per_epoch(self) -> int:
        """Training blocks; together every token but the first, and up to a block less one at the end, is a target."""
        return blocks_per_epoch(self.train.num_tokens, self.block_length)


def open_sources(recipe: Recipe) -> dict[str, Source]:
    """Every source that a stage reads, by name, in the order of their first use.

    Checks that manifests and shards are there and whole, unchanged since they were staged, have one tokenizer, and fit
    the recipe. Raises UserError.
    """
    require_variables(recipe)
    manifests = read_source_manifests(recipe)
    check_manifests(recipe, {name: (source_path(recipe, name), manifest) for name, manifest in manifests.items()})
    files = staged_files(recipe, manifests)
    allow_open_files(sum(_number_of_files(manifest, files.get(name)) for name, manifest in manifests.items()))
    return {name: _open(recipe, name, manifest, files.get(name)) for name, manifest in manifests.items()}


def read_source_manifests(recipe: Recipe) -> dict[str, Manifest]:
    """The manifest of every source that a stage reads, by name. UserError where one is missing or cannot be read."""
    return {name: _manifest_in(place_of(recipe, name)) for name in source_names(recipe)}


def check_manifests(recipe: Recipe, manifests: Mapping[str, tuple[Path | str, Manifest]]) -> None:
    """UserError where sources (by name, with their places) do not fit the recipe or each other."""
    vocab_size = recipe.model.architecture.vocab_size
    for place, manifest in manifests.values():
        if manifest.vocab_size > vocab_size:
            raise UserError(
                f"model.model_config.vocab_size: {vocab_size}: the shards in {place} were made with a vocabulary of "
                f"{manifest.vocab_size}, expected at most as many"
            )
    for stage in recipe.data_stages:
        for name in stage.data.dataset.dataset_folder:
            _check_dataset(stage.name, stage.data.dataset, *manifests[name])
    _check_tokenizer(recipe, list(manifests.values()))


def staged_files(recipe: Recipe, manifests: Mapping[str, Manifest]) -> dict[str, list[int] | None]:
    """By staged source, the numbers of the training files that are to be opened; None: all, because all are there.

    Every one of them, and what is held out, is as it was staged. Raises NotStaged where one is missing, UserError where
    one was changed.
    """
    staged = {name: _staged_in(place_of(recipe, name)) for name in manifests}
    partial = {
        name: manifests[name]
        for name, copies in staged.items()
        if copies is not None and any(file.name not in copies.files for file in manifests[name].train.files)
    }
    read = files_read(recipe, partial) if partial else {}
    found: dict[str, list[int] | None] = {}
    for name, copies in staged.items():
        if copies is not None:
            found[name] = read.get(name)
            _check_copies(copies, expected_files(copies.folder, manifests[name], found[name]))
    return found


def _staged_in(place: Place) -> StagedFolder | None:
    copies = read_staged(place.folder)
    if copies is None and place.copy is not None:
        raise _not_staged(place)
    return copies


def _check_copies(copies: StagedFolder, files: list[ExpectedFile]) -> None:
    missing = [file for file in files if file.name not in copies.files]
    if missing:
        raise NotStaged(
            f"{copies.folder}: {len(missing)} of {len(files)} files that the run reads are not staged, "
            f"{missing[0].path.name} for one; run `nanotron-recipes data stage RECIPE` on this machine"
        )
    for file in files:
        change = copies.change_of(file)
        if change is not None:
            raise UserError(f"{file.path}: {change}; run `nanotron-recipes data stage RECIPE`, which hashes it again")


def _not_staged(place: Place) -> NotStaged:
    return NotStaged(
        f"data_stages dataset_folder: {place.name}: {place.folder}: not staged yet; run `nanotron-recipes data stage "
        "RECIPE` on this machine first"
    )


def _manifest_in(place: Place) -> Manifest:
    folder = place.folder
    if not (folder / MANIFEST_NAME).is_file():
        if place.copy is not None:
            raise _not_staged(place)
        what = "no such folder" if not folder.is_dir() else f"no {MANIFEST_NAME} in it"
        where = f"{place.name}: {folder}" if place.name != str(folder) else place.name
        raise UserError(f"data_stages dataset_folder: {where}: {what}; run `nanotron-recipes tokenize RECIPE` first")
    return read_manifest(folder)


def _number_of_files(manifest: Manifest, train: list[int] | None) -> int:
    """Tokens and indices of the training files with these numbers, or of all, and of what is held out."""
    return 2 * (len(manifest.train.files if train is None else train) + len(manifest.validation.files))


def _open(recipe: Recipe, name: str, manifest: Manifest, files: list[int] | None) -> Source:
    folder, vocab_size = source_path(recipe, name), manifest.vocab_size
    source = Source(
        name=name,
        folder=folder,
        manifest=manifest,
        train=ShardReader(folder, manifest.train, manifest.dtype, vocab_size, files),
        validation=ShardReader(folder, manifest.validation, manifest.dtype, vocab_size),
        seed=next(stage.data.seed for stage in recipe.data_stages if name in stage.data.dataset.dataset_folder),
        block_length=block_length(recipe),
    )
    if source.blocks_per_epoch == 0:
        key = "sequence_length" if recipe.tokens.block_length is None else "block_length"
        raise UserError(
            f"tokens.{key}: {source.block_length}: {folder} has only {source.train.num_tokens} "
            f"training tokens, less than one {'sequence' if key == 'sequence_length' else 'block'} and its last target"
        )
    return source


def _check_dataset(stage: str, dataset: Dataset, place: Path | str, manifest: Manifest) -> None:
    for key, value, found in (
        ("vocab_size", dataset.vocab_size, manifest.vocab_size),
        ("token_size_in_bytes", dataset.token_size_in_bytes, manifest.token_bytes),
    ):
        if value is not None and value != found:
            raise UserError(f"data_stages {stage}: dataset.{key}: {value}: the shards in {place} have {found}")


def _check_tokenizer(recipe: Recipe, manifests: list[tuple[Path | str, Manifest]]) -> None:
    first_place, first = manifests[0]
    for place, manifest in manifests[1:]:
        if manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise UserError(f"{place} and {first_place} were tokenized with different tokenizers")
    if recipe.tokenizer.tokenizer_name_or_path is None and recipe.tokenizer.train is None:
        return
    tokenizer = tokenizer_of(recipe)
    for place, manifest in manifests:
        if manifest.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(f"{place}: its shards were not made with the tokenizer in {tokenizer.folder}")
