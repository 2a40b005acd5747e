"""The tree of keys that a recipe may have, read off the schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.section import NoEffect, Section


@dataclass(frozen=True)
class Key:
    """A key of a section of the schema."""

    name: str
    """As in the file."""
    attribute: str
    """As in Python."""
    field: FieldInfo
    section: type[Section] | None
    """The section below the key."""
    repeated: bool
    """Whether the key holds a list of that section."""
    has_free_names: bool
    """Whether what is below the key has names of the user's, not of a section."""

    @property
    def no_effect(self) -> str | None:
        """Why the key changes nothing, where it is marked so."""
        return next((mark.reason for mark in self.field.metadata if isinstance(mark, NoEffect)), None)


def keys_of(section: type[Section]) -> dict[str, Key]:
    """Return the keys of a section by their names in the file."""
    keys = {}
    for attribute, field in section.model_fields.items():
        name = field.alias or attribute
        below, repeated = _section_in(field.annotation)
        keys[name] = Key(name, attribute, field, below, repeated, _is_mapping(field.annotation))
    return keys


def section_at(path: tuple[str | int, ...]) -> type[Section] | None:
    """Return the section that a path of names and indices leads to, if it leads to one."""
    section: type[Section] | None = Recipe
    for part in path:
        if isinstance(part, int):
            continue
        key = keys_of(section).get(part) if section else None
        section = key.section if key else None
    return section


def all_keys(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Yield every key with its dotted path, sections before their keys; `[]` stands for the entries of a list."""
    for name, key in keys_of(section).items():
        path = f"{prefix}{name}"
        yield path, key
        if key.section:
            yield from all_keys(key.section, f"{path}{'[]' if key.repeated else ''}.")


def keys_without_effect(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return path and reason of each key in a raw mapping that is accepted and changes nothing, each once."""
    found: dict[str, str] = {}
    _collect(mapping, Recipe, "", found)
    return list(found.items())


def _collect(mapping: Mapping[str, Any], section: type[Section], prefix: str, found: dict[str, str]) -> None:
    keys = keys_of(section)
    for name, value in mapping.items():
        key, path = keys.get(name), f"{prefix}{name}"
        if key is None:
            continue
        if key.no_effect:
            found[path] = key.no_effect
        elif key.section and isinstance(value, Mapping):
            _collect(value, key.section, f"{path}.", found)
        elif key.section and isinstance(value, list):
            for entry in value:
                if isinstance(entry, Mapping):
                    _collect(entry, key.section, f"{path}[].", found)


def _is_mapping(annotation: Any) -> bool:
    """Whether a value may be a mapping that is no section."""
    return get_origin(annotation) is dict or any(get_origin(each) is dict for each in get_args(annotation))


def _section_in(annotation: Any) -> tuple[type[Section] | None, bool]:
    """Find the section inside `Section`, `Section | None` or `list[Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    arguments = get_args(annotation)
    if get_origin(annotation) is list and arguments:
        section, _ = _section_in(arguments[0])
        return section, section is not None
    if get_origin(annotation) in (Union, UnionType):
        return next((found for found in map(_section_in, arguments) if found[0]), (None, False))
    return None, False
