"""pydantic's findings as one short message for the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nanotron_recipes.errors import NO_VALUE, UserError, nearest_name, user_error
from nanotron_recipes.fields import Key, all_keys, keys_of, section_at

Path = tuple[str | int, ...]

_UNKNOWN = ("extra_forbidden", "invalid_key")

_EXPECTED: dict[str, Callable[[dict[str, Any]], str]] = {
    "int_type": lambda _: "an integer",
    "int_from_float": lambda _: "an integer",
    "float_type": lambda _: "a number",
    "bool_type": lambda _: "true or false",
    "string_type": lambda _: "text",
    "list_type": lambda _: "a list",
    "dict_type": lambda _: "a section of keys",
    "model_type": lambda _: "a section of keys",
    "finite_number": lambda _: "a finite number",
    "too_short": lambda _: "at least one entry",
    "greater_than": lambda context: f"more than {context['gt']}",
    "greater_than_equal": lambda context: f"at least {context['ge']}",
    "less_than": lambda context: f"less than {context['lt']}",
    "literal_error": lambda context: str(context["expected"]),
}


def complaint(error: ValidationError) -> UserError:
    """Turn the most telling finding into a UserError: key, value, what was expected, nearest name."""
    findings = error.errors(include_url=False)
    # A misspelt key is often also a missing one; the misspelling is what the user can see.
    finding = next((each for each in findings if each["type"] in _UNKNOWN), findings[0])
    path = _path_in_file(finding["loc"])
    key = ".".join(map(str, path))
    if finding["type"] in _UNKNOWN:
        return _unknown_key(path, finding["input"])
    if finding["type"] == "missing":
        return user_error("missing; this key has no default", key=key)
    same_place = [each for each in findings if _path_in_file(each["loc"]) == path]
    expected = "expected " + " or ".join(dict.fromkeys(_expected(each) for each in same_place))
    return user_error(expected, key=key, value=finding["input"], nearest=_nearest_value(same_place))


def _unknown_key(path: Path, value: Any) -> UserError:
    *parents, name = path
    section = section_at(tuple(parents))
    valid = list(keys_of(section)) if section else []
    nearest = nearest_name(str(name), valid) or _same_key_elsewhere(str(name))
    listing = "" if nearest else f"; expected one of {', '.join(valid)}"
    scalar = value if isinstance(value, str | int | float | None) else NO_VALUE
    key = ".".join(map(str, path))
    return user_error(f"unknown key{listing}", key=key, value=scalar, nearest=nearest)


def _same_key_elsewhere(name: str) -> str | None:
    return next((path for path, key in all_keys() if key.name == name and key.section is None), None)


def _path_in_file(location: Sequence[str | int]) -> Path:
    """Cut off what pydantic appends to a key's path for the branches of a union."""
    path: list[str | int] = []
    section: Any = section_at(())
    key: Key | None = None
    for part in location:
        if isinstance(part, str):
            if section is None and not (key is not None and key.has_free_names):
                break
            key = keys_of(section).get(part) if section else None
            section = key.section if key else None
        path.append(part)
    return tuple(path)


def _expected(finding: ErrorDetails) -> str:
    describe = _EXPECTED.get(finding["type"])
    return describe(finding.get("ctx", {})) if describe else str(finding["msg"])


def _nearest_value(findings: list[ErrorDetails]) -> str | None:
    literal = next((each for each in findings if each["type"] == "literal_error"), None)
    if literal is None or not isinstance(literal["input"], str):
        return None
    choices = literal["ctx"]["expected"].replace(" or ", ", ").split(", ")
    return nearest_name(literal["input"], [choice.strip("'") for choice in choices])
