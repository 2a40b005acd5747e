"""The table of adaptations is complete, true and up to date."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from parallel.adaptations import ADAPTATIONS, TABLE_FILE, Adaptation, render_table

ROOT = Path(__file__).resolve().parents[2]


def definitions(file: Path) -> set[str]:
    """Names of the functions, classes and methods of a module."""
    tree = ast.parse(file.read_text())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found.update(f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))
    return found


def split_symbol(symbol: str) -> tuple[Path, str]:
    """(file of nanotron, name in it) of a dotted path."""
    from importlib.util import find_spec

    spec = find_spec("nanotron")
    assert spec is not None and spec.origin is not None
    parts, path = symbol.split("."), Path(spec.origin).parent
    while parts and ((path / parts[0]).is_dir() or (path / f"{parts[0]}.py").is_file()):
        path = path / parts.pop(0)
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")), ".".join(parts)


def test_the_page_is_what_the_table_renders() -> None:
    assert TABLE_FILE.read_text(encoding="utf-8") == render_table(), "stale: run python -m parallel.adaptations"


@pytest.mark.parametrize("adaptation", ADAPTATIONS, ids=lambda adaptation: adaptation.name)
def test_what_an_adaptation_names_exists(adaptation: Adaptation) -> None:
    for symbol in adaptation.symbol.split(", "):
        file, name = split_symbol(symbol)
        assert file.is_file() and (not name or name in definitions(file)), symbol
    assert (ROOT / adaptation.where).is_file()
    test_file, test_name = adaptation.test.split("::")
    assert test_name in definitions(ROOT / test_file)


def test_names_are_unique() -> None:
    names = [adaptation.name for adaptation in ADAPTATIONS]
    assert len(names) == len(set(names))


def extended() -> set[tuple[str, str]]:
    """(our file, the class of nanotron below `nanotron.`) of every class of ours."""
    found = set()
    for file in sorted(file for folder in ("parallel", "model", "launch") for file in (ROOT / folder).rglob("*.py")):
        if not re.search(r"^ *(from|import) nanotron\b", file.read_text(), flags=re.MULTILINE):
            continue
        where = file.relative_to(ROOT)
        module = importlib.import_module(".".join(where.with_suffix("").parts))
        own = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
        found |= {
            (str(where), f"{base.__module__}.{base.__qualname__}".removeprefix("nanotron."))
            for each in own
            for base in each.__bases__
            if base.__module__.startswith("nanotron.")
        }
    return found


def test_every_class_of_nanotron_that_we_extend_is_in_the_table() -> None:
    listed = {(a.where, symbol) for a in ADAPTATIONS if a.kind == "subclass" for symbol in a.symbol.split(", ")}
    found = extended()
    assert ("model/llama.py", "models.base.NanotronModel") in found
    for where, base in found:
        own = [symbol for file, symbol in listed if file == where]
        assert any(f"{symbol}.".startswith(f"{base}.") for symbol in own), f"{where} extends {base}"


def test_files_that_adapt_nanotron_are_in_the_table() -> None:
    """A file of parallel/ whose first lines speak of what nanotron does wrong is an adaptation."""
    listed = {adaptation.where for adaptation in ADAPTATIONS}
    for file in sorted((ROOT / "parallel").glob("*.py")):
        documentation = ast.get_docstring(ast.parse(file.read_text())) or ""
        blames = re.search(r"nanotron's|nanotron 0\.4", documentation)
        if blames and file.name != "adaptations.py":
            assert f"parallel/{file.name}" in listed, f"{file.name}: {documentation.splitlines()[0]}"
