"""One strict YAML file a stage: every key is known, of the right type, and can be changed with --set."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from posttraining.errors import NO_VALUE, Mistake, mistake, nearest_name
from posttraining.limits import check_values
from posttraining.overrides import apply_override
from posttraining.yaml_text import parse_yaml

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
"""The shipped recipes, <name>/<stage>.yaml."""


@dataclass(kw_only=True)
class StageSettings:
    """What every stage that reads or writes a model takes."""

    model: str
    """The folder the stage starts from, in Hugging Face form."""
    output_dir: str
    """The folder the stage writes, whole or not at all; an unfinished training is kept beside it."""
    cpu_threads: int | None = None
    """Threads that torch computes with on a CPU. The order of sums, so the last bits, depends on it: 1 makes a run
    repeatable on a busy machine. null: as many as torch chooses."""


def config_path(name: str, stage: str) -> Path:
    """The file that `name` means: a path, or a shipped recipe's name (`tiny` is recipes/tiny/<stage>.yaml)."""
    path = Path(name)
    is_path = path.suffix in {".yaml", ".yml"} or "/" in name
    shipped = RECIPES / name / f"{stage}.yaml"
    if shipped.is_file() and not is_path:
        return shipped
    if name and path.is_dir():
        raise mistake(name, None, NO_VALUE, "is a folder; expected a YAML file, or the name of a shipped recipe")
    if is_path and path.is_file():
        return path
    if is_path:
        raise mistake(name, None, NO_VALUE, "no such file")
    names = sorted(folder.name for folder in RECIPES.iterdir() if (folder / f"{stage}.yaml").is_file())
    expected = f"no such recipe of the stage {stage}; expected a YAML file or one of {', '.join(names)}"
    raise mistake(None, None, name, expected, nearest_name(name, names))


def read_mapping(name: str, stage: str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Path]:
    """The keys of the file that `name` means (see `config_path`) with `key.sub=value` overrides applied, and the file.

    Raises Mistake where the file is not a YAML mapping or an override is not `key=value`.
    """
    path = config_path(name, stage)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Mistake(f"{path}: not YAML: {error}") from error
    except OSError as error:
        raise Mistake(f"{path}: cannot be read: {error.strerror}") from error
    mapping = parse_yaml(text, str(path))
    if not isinstance(mapping, dict) or not all(isinstance(key, str) for key in mapping):
        raise mistake(path, None, NO_VALUE, "expected a mapping of keys to values")
    for override in overrides:
        apply_override(mapping, override)
    return mapping, path


def load(
    name: str, stage: str, classes: Sequence[type[Any]], overrides: Sequence[str] = ()
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Objects of `classes` (dataclasses, TRL's config classes among them) from one file, and the mapping it came to.

    A key belongs to every class that has a field of that name; a section is a field whose type is a dataclass. A key
    that none has, a value of another type, or a required field without a value raises Mistake. So does what the class
    itself refuses (ValueError).
    """
    mapping, path = read_mapping(name, stage, overrides)
    return build(mapping, path, classes), mapping


def build(mapping: Mapping[str, Any], file: str | Path, classes: Sequence[type[Any]]) -> tuple[Any, ...]:
    """The objects of `classes` that `mapping` describes; see `load`. `file` is what messages name."""
    known = {field.name for cls in classes for field in dataclasses.fields(cls) if field.init}
    check_keys(mapping, known, file, "")
    return tuple(_object(cls, mapping, file, "") for cls in classes)


def read_section(cls: type[Any], mapping: Mapping[str, Any], file: str | Path) -> Any:
    """The object of `cls` that its keys of `mapping` describe, whatever else is in there; see `load`."""
    return _object(cls, mapping, file, "")


def _object(cls: type[Any], mapping: Mapping[str, Any], file: str | Path, prefix: str) -> Any:
    hints = get_type_hints(cls)
    values = {}
    for entry in dataclasses.fields(cls):
        if not entry.init:
            continue
        if entry.name in mapping:
            key = f"{prefix}{entry.name}"
            values[entry.name] = _value(mapping[entry.name], hints[entry.name], file, key)
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise mistake(file, f"{prefix}{entry.name}", NO_VALUE, "is missing")
    check_values(cls.__name__, values, file, prefix)
    try:
        return cls(**values)
    except Mistake as error:  # a class does not know its file
        raise Mistake(f"{file}: {prefix}{error}") from error.__cause__
    except (ValueError, TypeError, ImportError) as error:
        raise Mistake(f"{file}: {prefix}{error}") from error


def check_keys(mapping: Mapping[str, Any], known: set[str], file: str | Path, prefix: str) -> None:
    """Raise Mistake at a key of `mapping` that is not `known`; `prefix`: of the keys, where they are a section's."""
    for key in mapping:
        if key not in known:
            nearest = nearest_name(str(key), known)
            raise mistake(file, f"{prefix}{key}", NO_VALUE, "unknown key", nearest and f"{prefix}{nearest}")


def _value(value: Any, hint: Any, file: str | Path, key: str) -> Any:
    """`value` as a field of type `hint` takes it; Mistake where it is of another type."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        fits, converted = _fit(value, option, file, key)
        if fits:
            return converted
    expected = f"expected {' or '.join(_type_name(option) for option in options)}"
    if isinstance(value, bool) and str in options:
        # YAML 1.1 reads no, off, yes and on so.
        expected += f'; a word such as {"yes" if value else "no"} needs quotes: "{"yes" if value else "no"}"'
    raise mistake(file, key, value, expected)


def _fit(value: Any, hint: Any, file: str | Path, key: str) -> tuple[bool, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        known = {entry.name for entry in dataclasses.fields(hint)}
        check_keys(value, known, file, f"{key}.")
        return True, _object(hint, value, file, f"{key}.")  # type: ignore[arg-type]
    if hint is Any:
        return True, value
    if hint is None or hint is type(None):
        return value is None, None
    if origin is Literal:
        return value in arguments, value
    if origin is list and isinstance(value, list):
        return True, [_value(entry, arguments[0], file, f"{key}.{number}") for number, entry in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return True, {name: _value(entry, arguments[1], file, f"{key}.{name}") for name, entry in value.items()}
    if hint is dict:
        return isinstance(value, dict), value
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool), value
    if hint is float and isinstance(value, int):
        return True, float(value)
    if isinstance(hint, type) and not dataclasses.is_dataclass(hint):
        # An enumeration of transformers takes its value as text.
        return isinstance(value, hint) or (isinstance(value, str) and hint not in (int, float, list)), value
    return False, None


_TYPE_NAMES: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a section",
    list: "a list",
}


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if dataclasses.is_dataclass(hint):
        return "a section"
    return _TYPE_NAMES.get(get_origin(hint) or hint) or str(getattr(hint, "__name__", hint))
