"""Text that every Python installation brings along: the standard library's modules, and the prose written in them."""

import ast
import inspect
import os
import sysconfig
from pathlib import Path

_LEFT_OUT = frozenset(
    {
        # Not part of the language: installed packages, tests, an editor.
        *("site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "__pycache__"),
        # Tables, not programs; pydoc_data is prose and read as such.
        *("encodings", "pydoc_data"),
    }
)
_SHORTEST_MODULE = 200
"""Characters; shorter files only mark packages, many with the same words."""
_SHORTEST_COMMENT = 60


def module_files() -> list[tuple[str, Path]]:
    """The standard library's modules as (name relative to the library, file), in the order of their names."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith("config-")]
        names = [name for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")]
        found += [Path(folder, name) for name in names]
    return sorted((path.relative_to(library).as_posix(), path) for path in found)


def read_module(path: Path) -> str:
    """A module's code, "" where it is not UTF-8 or next to nothing."""
    try:
        code = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    return code if len(code) >= _SHORTEST_MODULE else ""


def read_prose(path: Path) -> str:
    """The prose in a module, see prose_of."""
    return prose_of(read_module(path))


def prose_of(code: str) -> str:
    """A module's docstrings and its longer comments in their order, one paragraph each; "" where there are none."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return ""
    pieces: dict[int, str] = {}
    inside: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            pieces[first.lineno] = inspect.cleandoc(first.value.value)
            inside.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    pieces.update(_comments(code, inside))
    return "\n\n".join(text for _, text in sorted(pieces.items()) if text)


def _comments(code: str, docstring_lines: set[int]) -> dict[int, str]:
    """Blocks of comment lines that read as a sentence or more, by their first line."""
    blocks: dict[int, list[str]] = {}
    start = 0
    for number, line in enumerate(code.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith("#") and not stripped.startswith("#!") and number not in docstring_lines:
            start = start or number
            blocks.setdefault(start, []).append(stripped.lstrip("#").strip())
        else:
            start = 0
    joined = {number: "\n".join(filter(_has_letters, lines)) for number, lines in blocks.items()}
    return {number: text for number, text in joined.items() if len(text) > _SHORTEST_COMMENT and _is_prose(text)}


def _has_letters(text: str) -> bool:
    return any(map(str.isalpha, text))


def _is_prose(text: str) -> bool:
    return sum(character.isalpha() or character == " " for character in text) > 0.8 * len(text)


def help_topics() -> list[tuple[str, str]]:
    """Python's help on its topics (`help("assert")` …) as (name, text), in the order of the names."""
    from pydoc_data.topics import topics

    return sorted(topics.items())
