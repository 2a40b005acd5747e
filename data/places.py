"""Where a source comes from, and where its shards are read from on this machine."""

from dataclasses import dataclass
from pathlib import Path

from nanotron_recipes.errors import UserError
from nanotron_recipes.paths import s3_place
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.urls import is_url


@dataclass(frozen=True)
class Place:
    """An entry of dataset_folder."""

    name: str
    """The entry."""
    origin: str
    """Where its shards come from: a folder, or s3://bucket/prefix."""
    copy: Path | None
    """Folder of this machine that they are copied to and read from; None where they are read at their origin."""

    @property
    def folder(self) -> Path:
        """Where they are read from. UserError where they are on S3 and the recipe has no place for a copy."""
        if self.copy is not None:
            return self.copy
        if is_url(self.origin):
            raise UserError(
                f"data_stages dataset_folder: {self.origin}: expected a dataset_read_path for its copy on this "
                "machine, or --set data_staging.path=…"
            )
        return Path(self.origin)


def source_names(recipe: Recipe) -> list[str]:
    """Every entry of dataset_folder, in the order of their first use."""
    return list(dict.fromkeys(name for stage in recipe.data_stages for name in stage.data.dataset.dataset_folder))


def place_of(recipe: Recipe, name: str) -> Place:
    """The place of an entry of dataset_folder: under the corpus where it is the name of one of its sources."""
    corpus = recipe.corpus
    is_corpus = corpus is not None and name in {source.name for source in corpus.sources}
    origin = str(Path(corpus.path, name)) if corpus is not None and is_corpus else name
    copy = _read_path(recipe, name)
    if copy is None and recipe.data_staging.path is not None:
        copy = Path(recipe.data_staging.path, _below(origin))
    return Place(name, origin, None if copy == Path(origin) else copy)


def source_path(recipe: Recipe, name: str) -> Path:
    """The folder of this machine that an entry of dataset_folder is read from."""
    return place_of(recipe, name).folder


def _read_path(recipe: Recipe, name: str) -> Path | None:
    for stage in recipe.data_stages:
        dataset = stage.data.dataset
        if dataset.dataset_read_path is not None and name in dataset.dataset_folder:
            return Path(dataset.dataset_read_path[dataset.dataset_folder.index(name)])
    return None


def _below(origin: str) -> Path:
    """The path of a copy below data_staging.path."""
    place = s3_place(origin)
    if place is not None:
        return Path("s3", *place)
    folder = Path(origin).absolute()
    return folder.relative_to(folder.anchor)
