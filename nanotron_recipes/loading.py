"""From a name or a file, through overrides, to a validated recipe, and back to YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nanotron_recipes.checks import problems
from nanotron_recipes.compat import modernise
from nanotron_recipes.complaints import complaint
from nanotron_recipes.errors import UserError, nearest_name, user_error
from nanotron_recipes.fields import Key, keys_of
from nanotron_recipes.notes import notes_on
from nanotron_recipes.origin import Origin
from nanotron_recipes.overrides import SOURCE as OVERRIDE
from nanotron_recipes.overrides import apply_overrides, keep_batch, shown_override
from nanotron_recipes.paths import with_home
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.section import Section
from nanotron_recipes.schema.slurm import Slurm
from nanotron_recipes.topology import resolve_topology
from nanotron_recipes.variables import fill_variables
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
    if not name_or_path:
        raise user_error("expected the name of a shipped recipe, or a path", value=name_or_path)
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise user_error(f"cannot be looked up: {error.strerror}", source=name_or_path) from None
    if path.is_dir():
        raise user_error("expected a recipe file, found a folder", source=name_or_path)
    if path.exists():
        kind = "pipe" if path.is_fifo() else "socket" if path.is_socket() else "device"
        raise user_error(f"expected a recipe file, which can be read again, found a {kind}", source=name_or_path)
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
    changed, overridden, override_notes = _changed(raw, overrides)
    try:
        recipe = _validate(changed, name)
    except UserError as error:
        where = Origin(source, text, tuple(overridden)).of(error.key or "")
        if where != OVERRIDE:
            where = _culprit(raw, overrides, name) or where
        raise user_error(str(error), source=where) from None
    return LoadedRecipe(recipe, [*spelling_notes, *override_notes, *notes_on(changed, recipe)], name, path)


def dump_yaml(recipe: Recipe, encoding: str = "utf-8") -> str:
    """Write the resolved recipe: every key with an effect, and of those without one, and of section `slurm`, what the
    user wrote.

    Reading it back gives an equal recipe, also where `encoding` lacks some of its signs.
    """
    return to_yaml(_plain(recipe), encoding)


def _short(path: Path) -> str:
    """Return the path as a message shows it: from the working directory where it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, FileNotFoundError):  # it lies elsewhere, or the working directory was deleted
        return str(path)


def _changed(raw: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Apply the overrides; return the mapping, the keys that they set, and notes."""
    kept, batch_notes = keep_batch(raw, overrides)
    changed, overridden = apply_overrides(kept, overrides)
    changed, spelling_notes = modernise(changed)
    changed, variable_notes = fill_variables(changed, os.environ)
    return changed, overridden, [*spelling_notes, *batch_notes, *variable_notes]


def _validate(raw: dict[str, Any], name: str) -> Recipe:
    """Return the recipe; raise UserError with the key that is wrong, and without where it stands."""
    try:
        recipe = with_home(Recipe.model_validate(_with_corpus_path(raw, name)))
    except ValidationError as error:
        raise complaint(error) from None
    problem = next(problems(recipe), None)
    if problem is not None:
        raise user_error(problem.expected, key=problem.key, value=problem.value, nearest=problem.nearest)
    resolve_topology(recipe)
    return recipe


def _culprit(raw: dict[str, Any], overrides: Sequence[str], name: str) -> str | None:
    """Return the override without which all is well, or only that it is one of them; None where the file is wrong."""

    def is_well(some: Sequence[str]) -> bool:
        try:
            _validate(_changed(raw, some)[0], name)
        except UserError:
            return False
        return True

    if not overrides or not is_well(()):
        return None
    alone = (index for index in range(len(overrides)) if is_well([*overrides[:index], *overrides[index + 1 :]]))
    index = next(alone, None)
    return OVERRIDE if index is None else shown_override(overrides[index])


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
            if key.attribute in value.model_fields_set or not _goes_without_saying(value, key)
        }
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _goes_without_saying(section: Section, key: Key) -> bool:
    """Whether a dump leaves out a key that nobody wrote: it does nothing, or a profile's value goes before its default,
    but not before what is written."""
    return key.no_effect is not None or isinstance(section, Slurm)
