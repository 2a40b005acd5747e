"""`${NAME}` in a recipe: places that differ from one machine to the next.

A name is given in section `variables` or by the environment variable of that name; what is written into a run's folder
has the value, not the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nanotron_recipes.errors import UserError, nearest_name
from nanotron_recipes.recipe import Recipe

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_BROKEN = re.compile(r"\$\{(?!\w+\})")
_SHELL = "slurm.prologue"
"""Lines of a shell, which fills them itself, on each node."""
_FREE = ("general.purpose", "optimizer.weight_decay_exclude_named_params")
"""Text for people, and regular expressions: "${" may stand in them for itself."""


def fill_variables(raw: dict[str, Any], environment: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return the mapping with `${NAME}` replaced by its value from `variables`, else from the environment, and a note
    for each entry of `variables` that nothing names. Entries that are used are gone; names without a value stay.

    An entry of `variables` may itself name variables of the environment, not other entries. `slurm.prologue` stays as
    it is.
    """
    given = raw.get("variables")
    if given is None:
        given = {}
    if not isinstance(given, dict):
        return raw, []
    texts = {name: value for name, value in given.items() if isinstance(value, str)}
    values = {**environment, **_filled(texts, environment)}
    rest = {key: value for key, value in raw.items() if key != "variables"}
    named = {name: key for key, text in _texts(rest, "") for name in _VARIABLE.findall(text)}
    unused = {name: value for name, value in given.items() if name not in named or not isinstance(value, str)}
    notes = []
    for name in unused:
        nearest = nearest_name(str(name), named)
        hint = f"; did you mean {nearest}?" if nearest else ""
        notes.append(f"variables.{name}: not used: nothing in the recipe says ${{{name}}}{hint}")
    filled: dict[str, Any] = _filled(rest, values)
    return ({**filled, "variables": unused} if unused else filled), notes


def unset_variables(recipe: Recipe) -> dict[str, str]:
    """Return the names without a value, each with the first key that names it."""
    found: dict[str, str] = {}
    for key, text in _texts(recipe.model_dump(by_alias=True, exclude={"variables"}), ""):
        for name in _VARIABLE.findall(text):
            found.setdefault(name, key)
    return found


def broken_variables(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the text of what begins like a variable and is none: `${A:-b}`, where a shell has a
    default, or `${`."""
    for key, text in _texts(recipe.model_dump(by_alias=True), ""):
        if _BROKEN.search(text) and not key.startswith(_FREE):
            yield key, text


def require_variables(recipe: Recipe) -> None:
    """Raise UserError where a name has no value, naming it and what gives it one."""
    for name, key in unset_variables(recipe).items():
        raise UserError(f"{key}: ${{{name}}} is not set; {how_to_set(name, recipe)}")


def how_to_set(name: str, recipe: Recipe) -> str:
    """Return the two ways of giving a name its value."""
    if name in recipe.variables:  # a text of the recipe would have been filled: another value names it
        return f"expected an environment variable {name}, which alone are filled into values of variables"
    return f"expected --set variables.{name}=… or an environment variable {name}"


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the text of every string that variables are filled in."""
    if isinstance(value, str):
        if key != _SHELL:
            yield key, value
    elif isinstance(value, Mapping):
        for name, below in value.items():
            yield from _texts(below, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _texts(below, f"{key}.{index}")


def _filled(value: Any, values: Mapping[str, str], key: str = "") -> Any:
    if isinstance(value, str):
        return value if key == _SHELL else _VARIABLE.sub(lambda found: values.get(found[1], found[0]), value)
    if isinstance(value, dict):
        return {name: _filled(below, values, f"{key}.{name}" if key else str(name)) for name, below in value.items()}
    return [_filled(below, values, key) for below in value] if isinstance(value, list) else value
