"""YAML as a config means it: 1e-5 is a number, a key stands once, and nothing is nested without end."""

from __future__ import annotations

import re
from typing import Any

import yaml

from posttraining.errors import Mistake

MAX_DEPTH = 50
"""Levels of sections and lists that a config may have."""
_MAX_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number and a key may stand once."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            problem = f"the key {key.value} stands twice"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def parse_yaml(text: str, where: str) -> Any:
    """The value of one YAML document. Raises Mistake, `where: what is wrong (line N)`, where it is none, repeats a key,
    or has more depth or values than a config can have."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise Mistake(f"{where}: not YAML: {error.problem}{line}") from None
    except RecursionError:
        raise _too_deep(where) from None
    # A tag or a date that its text does not fit.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise Mistake(f"{where}: not YAML: {error}") from None
    _check_extent(value, where)
    return value


def _too_deep(where: str) -> Mistake:
    return Mistake(f"{where}: nested too deeply; expected at most {MAX_DEPTH} levels")


def _check_extent(value: Any, where: str) -> None:
    """Raise Mistake for what would take for ever to go through: an alias counts as what it stands for."""
    pending, count = [(value, 1)], 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise _too_deep(where)
        if count > _MAX_VALUES:
            raise Mistake(f"{where}: expected at most {_MAX_VALUES:,} values, aliases written out")
        if isinstance(value, dict | list):
            entries = value.values() if isinstance(value, dict) else value
            pending.extend((entry, depth + 1) for entry in entries)
