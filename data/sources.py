"""The tokenized sources of a recipe: found, opened and checked against the recipe before anything starts."""

from dataclasses import dataclass
from pathlib import Path

from data.manifest import MANIFEST_NAME, Manifest, read_manifest
from data.shards import ShardReader
from data.tokenizer import read_tokenizer, tokenizer_folder
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
        return max(0, (self.train.num_tokens - 1) // self.block_length)


def open_sources(recipe: Recipe) -> dict[str, Source]:
    """Every source that a stage reads, by name, in the order of their first use.

    Checks that manifests and shards are there and whole, have one tokenizer, and fit the recipe. Raises UserError.
    """
    require_variables(recipe)
    sources: dict[str, Source] = {}
    for stage in recipe.data_stages:
        for name in stage.data.dataset.dataset_folder:
            if name not in sources:
                sources[name] = _open(recipe, name, stage.data.seed)
            _check_dataset(stage.name, stage.data.dataset, sources[name])
    _check_tokenizer(recipe, list(sources.values()))
    return sources


def source_path(recipe: Recipe, name: str) -> Path:
    """The folder of an entry of dataset_folder: under the corpus where it is the name of one of its sources."""
    if recipe.corpus is not None and name in {source.name for source in recipe.corpus.sources}:
        return Path(recipe.corpus.path, name)
    return Path(name)


def read_source_manifests(recipe: Recipe) -> dict[str, Manifest]:
    """The manifest of every source that a stage reads, by name. UserError where one is missing or cannot be read."""
    names = [name for stage in recipe.data_stages for name in stage.data.dataset.dataset_folder]
    return {name: _manifest_in(name, source_path(recipe, name)) for name in dict.fromkeys(names)}


def _manifest_in(name: str, folder: Path) -> Manifest:
    if not (folder / MANIFEST_NAME).is_file():
        what = "no such folder" if not folder.is_dir() else f"no {MANIFEST_NAME} in it"
        raise UserError(
            f"data_stages dataset_folder: {name}: {folder}: {what}; run `nanotron-recipes tokenize RECIPE` first"
        )
    return read_manifest(folder)


def _open(recipe: Recipe, name: str, seed: int) -> Source:
    folder = source_path(recipe, name)
    manifest = _manifest_in(name, folder)
    vocab_size = recipe.model.architecture.vocab_size
    if manifest.vocab_size != vocab_size:
        raise UserError(
            f"model.model_config.vocab_size: {vocab_size}: the shards in {folder} were made with a vocabulary of "
            f"{manifest.vocab_size}"
        )
    source = Source(
        name=name,
        folder=folder,
        manifest=manifest,
        train=ShardReader(folder, manifest.train, manifest.dtype, vocab_size),
        validation=ShardReader(folder, manifest.validation, manifest.dtype, vocab_size),
        seed=seed,
        block_length=block_length(recipe),
    )
    if source.blocks_per_epoch == 0:
        key = "sequence_length" if recipe.tokens.block_length is None else "block_length"
        raise UserError(
            f"tokens.{key}: {source.block_length}: {folder} has only {source.train.num_tokens} "
            f"training tokens, less than one {'sequence' if key == 'sequence_length' else 'block'} and its last target"
        )
    return source


def _check_dataset(stage: str, dataset: Dataset, source: Source) -> None:
    manifest = source.manifest
    for key, value, found in (
        ("vocab_size", dataset.vocab_size, manifest.vocab_size),
        ("token_size_in_bytes", dataset.token_size_in_bytes, manifest.token_bytes),
    ):
        if value is not None and value != found:
            raise UserError(f"data_stages {stage}: dataset.{key}: {value}: the shards in {source.folder} have {found}")


def _check_tokenizer(recipe: Recipe, sources: list[Source]) -> None:
    for source in sources[1:]:
        if source.manifest.tokenizer_sha256 != sources[0].manifest.tokenizer_sha256:
            raise UserError(f"{source.folder} and {sources[0].folder} were tokenized with different tokenizers")
    if recipe.tokenizer.tokenizer_name_or_path is None and recipe.tokenizer.train is None:
        return
    tokenizer = read_tokenizer(tokenizer_folder(recipe))
    for source in sources:
        if source.manifest.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(f"{source.folder}: its shards were not made with the tokenizer in {tokenizer.folder}")
