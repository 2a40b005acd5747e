"""Sources of a mixture brought to one form: data sets store the same things in types of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttraining.errors import NO_VALUE, mistake

_NESTED = ("messages", "prompt", "chosen", "rejected", "tools")
"""Columns of mappings, each with keys of its own."""


def in_one_form(sources: Sequence[Any], file: str | Path | None) -> list[Any]:
    """The rows of each source (`datasets.Dataset`s) with every column that several of them have in one type.

    Mappings, and lists of them such as `messages`, then have the keys that their row gives them, whatever others have.
    Raises Mistake for a column that cannot be brought to one type, and names the source.
    """
    sources = [with_answers_as_text(rows) for rows in sources]
    for name in dict.fromkeys(name for rows in sources for name in rows.column_names):
        types = {number: rows.features[name] for number, rows in enumerate(sources) if name in rows.column_names}
        forms = {number: form for number, kind in types.items() if (form := _form(kind)) != "nothing"}
        first = next(iter(forms), None)
        if first is None or all(types[number] == types[first] for number in forms):
            continue
        odd = next((number for number in forms if forms[number] != forms[first]), None)
        if odd is not None:
            found = f"its {name!r} holds {forms[odd]}, that of data.sources.{first} {forms[first]}"
            raise mistake(file, f"data.sources.{odd}", NO_VALUE, f"{found}; expected one form")
        for number in forms:
            sources[number] = sources[number].cast_column(name, _common_type(forms[first]))
    return sources


def with_answers_as_text(rows: Any) -> Any:
    """Rows with the numbers of their column `answer` as text; as they are where it holds anything but text and whole
    numbers."""
    from datasets import Value

    if "answer" not in rows.column_names or rows.features["answer"] == Value("string"):
        return rows
    answers = list(rows["answer"])
    if not all(answer is None or isinstance(answer, str) or type(answer) is int for answer in answers):
        return rows
    texts = [None if answer is None else str(answer) for answer in answers]
    return rows.remove_columns("answer").add_column("answer", texts, feature=Value("string"))


def without_filled_nulls(rows: Any) -> Any:
    """Rows whose mappings have the keys that their row gives them.

    Arrow, so Parquet too, has one type for all mappings of a column, and fills in null for the keys that others have:
    the arguments of all other tools, in a tool call. No null can be told from those, so all are left out.
    """
    from datasets import Features

    names = [
        name
        for name in _NESTED
        if name in rows.column_names
        and _form(rows.features[name]) in ("mappings", "lists of mappings")
        and any(_has_nulls(chunk) for chunk in rows.data.column(name).chunks)
    ]
    if not names:
        return rows
    types = {name: _common_type(_form(rows.features[name])) for name in names}
    return rows.map(
        lambda row: {name: _without_nulls(row[name]) for name in names}, features=Features({**rows.features, **types})
    )


def _has_nulls(values: Any) -> bool:
    """Whether a mapping within a pyarrow array has a null."""
    from pyarrow import types

    if types.is_list(values.type) or types.is_large_list(values.type):
        return _has_nulls(values.flatten())
    return types.is_struct(values.type) and any(part.null_count or _has_nulls(part) for part in values.flatten())


def _without_nulls(value: Any) -> Any:
    match value:
        case Mapping():
            return {key: _without_nulls(part) for key, part in value.items() if part is not None}
        case list():
            return [_without_nulls(part) for part in value]
        case _:
            return value


def _form(kind: Any) -> str:
    """What a column of the type `kind`, one of `datasets`' features, holds: a form that `_common_type` knows,
    "nothing", or what `datasets` calls it."""
    from datasets import Json, LargeList, List, Value

    match kind:
        case Value(dtype="string" | "large_string" | "string_view"):
            return "text"
        case Value(dtype="null"):
            return "nothing"
        case Value(dtype=dtype) if dtype.startswith(("int", "uint", "float")):
            return "numbers"
        case Json() | Mapping():
            return "mappings"
        case List() | LargeList() if (inner := _form(kind.feature)) in ("mappings", "nothing"):
            return "lists of mappings" if inner == "mappings" else inner
        case _:
            return str(kind)


def _common_type(form: str) -> Any:
    from datasets import Json, List, Value

    return {
        "text": Value("string"),
        "numbers": Value("float64"),
        "mappings": Json(),
        "lists of mappings": List(Json()),
    }[form]
