"""From a name or a file, through overrides, to a validated recipe, and back to YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nanotron_recipes.checks import problems
from nanotron_recipes.compat import modernise
from nanotron_recipes.complaints import complaint
from nanotron_recipes.errors import UserError, nearest_name, user_error
from nanotron_recipes.fields import keys_of
from nanotron_recipes.notes import notes_on
from nanotron_recipes.origin import Origin
from nanotron_recipes.overrides import apply_overrides, keep_batch
from nanotron_recipes.paths import with_home
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.section import Section
from nanotron_recipes.topology import resolve_topology
from nanotron_recipes.yaml_text import parse_yaml, to_yaml


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with what was noticed while reading it."""

    recipe: Recipe
    notes: list[str]
    """What is legal but has no effect, is not available yet, or may surprise."""
    name: str
    """The shipped name or the file's stem; runs are named after it."""
    path: Path
    """The file."""


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the code, by name."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a shipped recipe by name or a file by path, apply `key.sub=value` overrides, and validate.

    Raises UserError with one line: the file (or --set), the key, the value, what was expected, the nearest valid name.
    """
    path = find_recipe(name_or_path)
    source = _short(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{source}: cannot be read: {reason}") from None
    mapping = parse_yaml(text, source)
    if mapping is None:
        raise UserError(f"{source}: the file is empty; expected a recipe (sections such as general, model, tokens)")
    return recipe_from_mapping(mapping, source=source, name=path.stem, path=path, text=text, overrides=overrides)


def find_recipe(name_or_path: str) -> Path:
    """Return the file of a shipped name or a path. Raises UserError with the nearest shipped name."""
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{name_or_path}: expected a recipe file, found a folder")
    expected = f"no such recipe or file; shipped recipes: {', '.join(shipped)}"
    raise user_error(expected, source=name_or_path, nearest=nearest_name(name_or_path, shipped))


def recipe_from_mapping(
    mapping: object,
    source: str = "recipe",
    *,
    name: str = "recipe",
    path: Path = Path("recipe.yaml"),
    text: str | None = None,
    overrides: Sequence[str] = (),
) -> LoadedRecipe:
    """Validate a raw mapping as `load_recipe` does a file.

    `source` is what messages call it, `text` the YAML it was read from, if any, for their line numbers; `name` gives
    the corpus its default folder. Raises UserError.
    """
    if not isinstance(mapping, Mapping):
        raise user_error("expected a recipe (sections of keys)", source=source, value=mapping)
    raw, spelling_notes = modernise(dict(mapping))
    raw, batch_notes = keep_batch(raw, overrides)
    raw, overridden = apply_overrides(raw, overrides)
    raw, override_notes = modernise(raw)
    recipe = _validate(_with_corpus_path(raw, name), Origin(source, text, tuple(overridden)))
    return LoadedRecipe(recipe, [*spelling_notes, *override_notes, *batch_notes, *notes_on(raw, recipe)], name, path)


def dump_yaml(recipe: Recipe) -> str:
    """Write the resolved recipe: every key with an effect, and of those without one what the user wrote.

    Reading it back gives an equal recipe.
    """
    return to_yaml(_plain(recipe))


def _short(path: Path) -> str:
    """Return the path as a message shows it: from the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _validate(raw: dict[str, Any], origin: Origin) -> Recipe:
    try:
        recipe = with_home(Recipe.model_validate(raw))
    except ValidationError as error:
        raise complaint(error, origin) from None
    problem = next(problems(recipe), None)
    if problem is not None:
        raise user_error(problem.expected, source=origin.of(problem.key), key=problem.key, value=problem.value)
    try:
        resolve_topology(recipe)
    except UserError as error:
        raise UserError(f"{origin.of(error.key or '')}: {error}") from None
    return recipe


def _with_corpus_path(raw: dict[str, Any], name: str) -> dict[str, Any]:
    corpus = raw.get("corpus")
    if isinstance(corpus, dict) and corpus.get("path") is None:
        return {**raw, "corpus": {"path": f"corpora/{name}", **{k: v for k, v in corpus.items() if k != "path"}}}
    return raw


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return {
            name: _plain(getattr(value, key.attribute))
            for name, key in keys_of(type(value)).items()
            if key.no_effect is None or key.attribute in value.model_fields_set
        }
    return [_plain(entry) for entry in value] if isinstance(value, list) else value
