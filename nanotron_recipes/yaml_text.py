"""YAML as a recipe means it: `2e-4` is a number, `10:00:00` is not, and a key stands once."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from nanotron_recipes.errors import UserError, one_line, shorten, user_error

MAX_DEPTH = 50
"""Levels of sections and lists that a recipe may have."""
_MAX_VALUES = 100_000
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.Inf|\.INF)$"
    r"|^\.(?:nan|NaN|NAN)$"
)
_REPLACED_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}


def _resolvers(
    inherited: dict[str, list[tuple[str, re.Pattern[str]]]],
) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's rules for what a plain scalar is, with numbers as above and without dates."""
    rules = {first: [rule for rule in old if rule[0] not in _REPLACED_TAGS] for first, old in inherited.items()}
    for first in "-+0123456789.":
        rules.setdefault(first, []).append(("tag:yaml.org,2002:float", _FLOAT))
        rules[first].append(("tag:yaml.org,2002:int", _INT))
    return rules


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers(yaml.SafeLoader.yaml_implicit_resolvers)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """What PyYAML raises for a value that its tag cannot be is of many kinds, and names no line."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, ArithmeticError, TypeError):
            raise _mistake(f"{_shown(node)} cannot be read as {node.tag.rpartition(':')[2]}", node) from None
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise _mistake(f"{_shown(node)} is beyond 64 bits", node)
        return _joined(value, node) if isinstance(value, str) else value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _mistake(f"the key {_shown(key)} stands twice in one place", key)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _mistake(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _joined(text: str, node: yaml.Node) -> str:
    """Make one character of two escapes that JSON writes for it (a surrogate pair); half a pair is none."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise _mistake("half of a surrogate pair is no character", node) from None


def _shown(node: yaml.Node) -> str:
    return shorten(repr(node.value), 60) if isinstance(node, yaml.ScalarNode) else "this"


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    short = all(isinstance(item, str | int | float | None) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=short)


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # Only double quotes keep control characters and unusual line ends.
    style = None if value.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)


def parse_yaml(text: str, source: str) -> Any:
    """Read one YAML document. Raises UserError with the line where the text is not YAML, repeats a key, or holds a
    number beyond 64 bits; and where there are several documents, or more values or depth than a recipe can have."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        if isinstance(error, yaml.composer.ComposerError) and "another document" in str(error.problem):
            raise user_error(f"expected one YAML document; another begins{_line(error)}", source=source) from None
        raise user_error(f"not valid YAML: {error.problem}{_line(error)}", source=source) from None
    except RecursionError:
        raise _too_deep(source) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise user_error(f"not valid YAML: {one_line(str(error))}", source=source) from None
    _check_extent(value, source)
    return value


def _line(error: yaml.MarkedYAMLError) -> str:
    return f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""


def _too_deep(source: str) -> UserError:
    return user_error(f"nested too deeply; expected at most {MAX_DEPTH} levels", source=source)


def _check_extent(value: Any, source: str) -> None:
    """Raise UserError for what would take for ever to show or to copy: an alias counts as what it stands for."""
    pending, count = [(value, 1)], 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise _too_deep(source)
        if count > _MAX_VALUES:
            raise user_error(f"expected at most {_MAX_VALUES:,} values, aliases written out", source=source)
        if isinstance(value, dict):
            pending.extend((entry, depth + 1) for entry in value.values())
        elif isinstance(value, list):
            pending.extend((entry, depth + 1) for entry in value)


def line_of(text: str, key: str) -> int | None:
    """Return the line, from 1, of a dotted key (numbers index lists) in valid YAML, or of what exists of its path."""
    node, line = yaml.compose(text, Loader=_Loader), None
    for part in key.split("."):
        if isinstance(node, yaml.MappingNode):
            found = next(((name, value) for name, value in node.value if name.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and part in map(str, range(len(node.value))):
            found = (node.value[int(part)],) * 2
        else:
            found = None
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def to_yaml(value: Any, encoding: str = "utf-8") -> str:
    """Write plain data so that `parse_yaml` gives the same back; escaped where `encoding` lacks a sign."""
    text = _dump(value, allow_unicode=True)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return _dump(value, allow_unicode=False)
    return text


def _dump(value: Any, *, allow_unicode: bool) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode, width=120)
