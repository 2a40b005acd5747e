"""The tokenized sources of a recipe: found, opened and checked against the recipe before anything starts."""

from dataclasses import dataclass
from pathlib import Path

from data.manifest import MANIFEST_NAME, Manifest, read_manifest
from data.order import Permutation, derive_key
from data.shards import Int64Array, ShardReader
from data.tokenizer import read_tokenizer, tokenizer_folder
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.data import Dataset


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
    sequence_length: int
    """Stride of the windows, S; a window has S + 1 tokens, the last of which is the next window's first."""

    @property
    def windows_per_epoch(self) -> int:
        """Training windows; together every token but the first, and up to S − 1 at the very end, is a target once."""
        return max(0, (self.train.num_tokens - 1) // self.sequence_length)

    def window_starts(self, ranks: Int64Array) -> Int64Array:
        """Of the samples `ranks` (int64, counted over the whole run) the first token of their windows.

        Every epoch has an order of its own. It follows from the shards' content, not from where they lie.
        """
        epochs, places = divmod(ranks, self.windows_per_epoch)
        starts = places.copy()
        for epoch in set(epochs.tolist()):
            order = Permutation(
                self.windows_per_epoch, derive_key(self.seed, "windows", self.manifest.fingerprint, epoch)
            )
            mine = epochs == epoch
            starts[mine] = order.of(places[mine])
        return starts * self.sequence_length


def open_sources(recipe: Recipe) -> dict[str, Source]:
    """Every source that a stage reads, by name, in the order of their first use.

    Checks that manifests and shards are there and whole, have one tokenizer, and fit the recipe. Raises UserError.
    """
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


def _open(recipe: Recipe, name: str, seed: int) -> Source:
    folder = source_path(recipe, name)
    if not (folder / MANIFEST_NAME).is_file():
        what = "no such folder" if not folder.is_dir() else f"no {MANIFEST_NAME} in it"
        raise UserError(
            f"data_stages dataset_folder: {name}: {folder}: {what}; run `nanotron-recipes tokenize RECIPE` first"
        )
    manifest = read_manifest(folder)
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
        sequence_length=recipe.tokens.sequence_length,
    )
    if source.windows_per_epoch == 0:
        raise UserError(
            f"tokens.sequence_length: {recipe.tokens.sequence_length}: {folder} has only {source.train.num_tokens} "
            "training tokens, less than one sequence and its last target"
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
