"""Training data: local files, Hugging Face data sets and mixtures of them, or the generated task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from posttraining.errors import NO_VALUE, Mistake, mistake, nearest_name
from posttraining.mixture import in_one_form, with_answers_as_text, without_filled_nulls
from posttraining.pair_turns import as_turns
from posttraining.rows import check_rows
from posttraining.tasks import arithmetic

Kind = Literal["chats", "prompts", "pairs"]
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "chats": ("messages",),
    "prompts": ("prompt",),
    "pairs": ("chosen", "rejected"),
}
"""What each kind of data must have in a row. A message is {"role", "content"}. Without `prompt`, what `chosen` and
`rejected` have in common at their beginning is the prompt."""
OPTIONAL = ("prompt", "answer", "chat_template_kwargs", "tools")
"""Columns that are kept where a source has them. Others are dropped, for sources rarely agree on them, except what a
reward takes."""

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(kw_only=True)
class SourceSettings:
    """One source of a mixture."""

    path: str
    """A .jsonl, .json, .parquet or .csv file, or the name of a data set on the Hugging Face Hub."""
    name: str | None = None
    """The data set's configuration."""
    split: str = "train"
    """The data set's split, or a part of it, train[:1000]; that of a file is train."""
    weight: float = 1.0
    """Share of the source's rows that is kept, chosen at random: 0 < weight ≤ 1."""
    enable_thinking: bool | None = None
    """The mode its conversations or pairs are rendered in; null: as their chat_template_kwargs or the template say."""

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise mistake(None, "weight", self.weight, "expected 0 < weight ≤ 1")


@dataclass(kw_only=True)
class DataSettings:
    """The rows of a stage: a file or data set, a mixture of several, or generated ones. Exactly one is given."""

    path: str | None = None
    """A .jsonl, .json, .parquet or .csv file, or the name of a data set on the Hugging Face Hub."""
    name: str | None = None
    """The data set's configuration."""
    split: str = "train"
    """The data set's split, or a part of it, train[:1000]; that of a file is train."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of `path` and `held_out_path` with the names that stages know them by, {problem: prompt}."""
    sources: list[SourceSettings] = field(default_factory=list)
    """A mixture: the rows that each source keeps, shuffled together."""
    generated: Literal["arithmetic"] | None = None
    """A task whose problems are generated; see tasks/arithmetic.py."""
    examples: int | None = None
    """Rows to generate, or to keep from the front of the others; null: all of them."""
    seed: int = 0
    """Of generating, of choosing and of shuffling rows."""
    held_out_path: str | None = None
    """A file in the same form with rows for evaluation only; for sft, prefer and compare."""

    def __post_init__(self) -> None:
        if self.path is None:
            for key, value, default in (("name", self.name, None), ("split", self.split, "train")):
                if value != default:
                    expected = "null" if default is None else default
                    raise mistake(None, key, value, f"expected {expected}; it is of data.path, which is not given")
            if self.columns and self.held_out_path is None:
                expected = "expected {}; they are of data.path and data.held_out_path, of which neither is given"
                raise mistake(None, "columns", self.columns, expected)
        names = list(self.columns.values())
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise mistake(None, "columns", self.columns, f"expected no two columns with one name, {twice!r}")


def load_data(settings: DataSettings, kind: Kind, file: str | Path | None = None, further: Collection[str] = ()) -> Any:
    """The `datasets.Dataset` that `settings` describe, with the columns of `kind` and `further` ones where it has them;
    `file` is what messages name.

    Raises Mistake where a source cannot be read, no row is left, a column is missing or a row holds something else.
    """
    check_sources(settings, file)
    if settings.generated:
        data = _generated(settings, kind, file)
    elif settings.path:
        source = SourceSettings(path=settings.path, name=settings.name, split=settings.split)
        data = _read(source, file, "data.path", settings.columns)
    else:
        data = _mixture(settings, kind, _kept(kind, further), file)
    if settings.examples is not None and len(data) > settings.examples:
        data = data.select(range(settings.examples))
    return _checked(data, kind, file, "data.path" if settings.path else "data", further)


def check_sources(settings: DataSettings, file: str | Path | None = None) -> None:
    """Raise Mistake where `settings` do not name one kind of source, or one of their files is not there. Reads none."""
    given = [key for key in ("generated", "path", "sources") if getattr(settings, key)]
    if len(given) != 1:
        found = " and ".join(f"data.{key}" for key in given) or "none"
        expected = f"expected one of data.path, data.sources and data.generated, not {found}"
        off = f"; add data.{given[0]}=null" if given else ""
        raise mistake(file, "data", NO_VALUE, f"{expected}{off}")
    if settings.path:
        _check_file(settings.path, file, "data.path")
    if settings.held_out_path:
        _check_file(settings.held_out_path, file, "data.held_out_path")
    for number, source in enumerate(settings.sources):
        _check_file(source.path, file, f"data.sources.{number}.path")


def check_prompts_alone(settings: DataSettings, mode_key: str) -> None:
    """Raise Mistake where `settings` have keys that are without effect in a stage that reads prompts; `mode_key` is the
    one that chooses the mode there."""
    if settings.held_out_path is not None:
        raise mistake(None, "data.held_out_path", settings.held_out_path, "expected null; it is not read here")
    for number, source in enumerate(settings.sources):
        if source.enable_thinking is not None:
            key = f"data.sources.{number}.enable_thinking"
            raise mistake(None, key, source.enable_thinking, f"expected null; here {mode_key} chooses the mode")


def as_conversations(data: Any) -> Any:
    """Rows of prompts with those that are text made a user's turn, for a model that knows chats."""
    from datasets import Features, Json, List

    if not any(isinstance(prompt, str) for prompt in data["prompt"]):
        return data
    features = Features({**data.features, "prompt": List(Json())})
    return data.map(lambda row: {"prompt": as_turns(row["prompt"], "user")}, features=features)


def load_held_out(settings: DataSettings, kind: Kind, file: str | Path | None = None) -> Any | None:
    """The rows at `held_out_path`; None where it is not set."""
    if settings.held_out_path is None:
        return None
    key = "data.held_out_path"
    _check_file(settings.held_out_path, file, key)
    rows = _read(SourceSettings(path=settings.held_out_path), file, key, settings.columns)
    return _checked(rows, kind, file, key)


def data_fingerprint(data: Any) -> str:
    """sha256 over the rows in their order, each as JSON with sorted keys and a newline: the same wherever they lie."""
    digest = hashlib.sha256()
    for row in data:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return digest.hexdigest()


def from_rows(rows: list[dict[str, Any]]) -> Any:
    """A `datasets.Dataset` of rows."""
    from datasets import Dataset

    return Dataset.from_list(rows)


def _generated(settings: DataSettings, kind: Kind, file: str | Path | None) -> Any:
    if settings.examples is None or settings.examples < 1:
        raise mistake(file, "data.examples", settings.examples, "expected how many problems to generate, 1 or more")
    if kind == "prompts":
        return from_rows(arithmetic.prompts(settings.seed, settings.examples, "train"))
    if kind == "pairs":
        raise mistake(file, "data.generated", settings.generated, "generates no pairs; run `posttraining pairs`")
    return from_rows(arithmetic.chats(settings.seed, settings.examples))


def _renamed(data: Any, columns: Mapping[str, str], file: str | Path | None, key: str) -> Any:
    """`key`: of the file or data set in the config, for messages."""
    for name in columns:
        if name not in data.column_names:
            expected = f"no such column; expected one of {key}'s: {', '.join(data.column_names)}"
            raise mistake(file, "data.columns", name, expected, nearest_name(name, data.column_names))
    # A column that has the name already gives way.
    data = data.remove_columns([name for name in columns.values() if name in data.column_names and name not in columns])
    return data.rename_columns(dict(columns))


def _mixture(settings: DataSettings, kind: Kind, kept: Collection[str], file: str | Path | None) -> Any:
    from datasets import concatenate_datasets

    parts = []
    for number, source in enumerate(settings.sources):
        key = f"data.sources.{number}"
        rows = _read(source, file, f"{key}.path")
        _check_names(rows, kind, file, key)
        if source.enable_thinking is not None:
            mode = {"enable_thinking": source.enable_thinking}
            rows = rows.remove_columns([name for name in ("chat_template_kwargs",) if name in rows.column_names])
            rows = rows.add_column("chat_template_kwargs", [mode] * len(rows))
        rows = rows.select_columns([name for name in kept if name in rows.column_names])
        if source.weight < 1:
            share = int(len(rows) * source.weight)
            if share == 0:
                raise mistake(file, f"{key}.weight", source.weight, f"keeps none of the source's {len(rows)} rows")
            rows = rows.shuffle(seed=settings.seed).select(range(share))
        parts.append(rows)
    return concatenate_datasets(in_one_form(parts, file)).shuffle(seed=settings.seed)


def _check_file(name: str, file: str | Path | None, key: str) -> None:
    """Raise Mistake where `name`, the value of `key`, is no file that can be read and no name of a data set either."""
    path, endings = Path(name), ", ".join(_BUILDERS)
    if path.is_dir():
        raise mistake(file, key, name, f"is a folder; expected a file that ends in one of {endings}")
    if path.suffix not in _BUILDERS:
        if path.is_file():
            raise mistake(file, key, name, f"expected a file that ends in one of {endings}")
    elif not path.is_file():
        raise mistake(file, key, name, "no such file")
    elif path.stat().st_size == 0:
        raise mistake(file, key, name, "holds no rows")


def _read(source: SourceSettings, file: str | Path | None, key: str, columns: Mapping[str, str] | None = None) -> Any:
    """The rows of a source, with its `columns` renamed."""
    from datasets import disable_progress_bars, load_dataset
    from datasets.utils import logging

    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)  # what is wrong is in the error, which is shown
    builder = _BUILDERS.get(Path(source.path).suffix)
    try:
        if builder:
            rows = load_dataset(builder, data_files=source.path, split=source.split)
        else:
            rows = load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # the readers below raise whatever they like
        reason = str(error.__cause__ or error).strip().splitlines()[:1]
        raise Mistake(f"{file}: {key}: {source.path!r}: cannot be read: {''.join(reason)}") from error
    rows = _renamed(rows, columns or {}, file, key)
    return rows if builder == "json" else without_filled_nulls(rows)  # those of JSON were written by someone


def _kept(kind: Kind, further: Collection[str]) -> list[str]:
    return list(dict.fromkeys((*COLUMNS[kind], *OPTIONAL, *further)))


def _checked(data: Any, kind: Kind, file: str | Path | None, key: str, further: Collection[str] = ()) -> Any:
    """`data` with the columns that stages of this kind read. Raises Mistake where a row does not hold them."""
    if len(data) == 0:
        raise mistake(file, key, NO_VALUE, "holds no rows")
    try:
        _check_columns(data, kind, file, key)
        check_rows(data, kind, file, key)
    except UnicodeDecodeError as error:  # bytes are read as text when a row is asked for
        raise mistake(file, key, NO_VALUE, f"cannot be read: its text is not UTF-8 ({error})") from error
    data = with_answers_as_text(data)
    data = data.select_columns([name for name in _kept(kind, further) if name in data.column_names])
    if "chat_template_kwargs" in data.column_names and None in data["chat_template_kwargs"]:
        # A row without the column, beside rows with it: it is rendered as the template does by default.
        data = data.map(lambda row: {"chat_template_kwargs": row["chat_template_kwargs"] or {"enable_thinking": None}})
    return data


def _check_names(data: Any, kind: Kind, file: str | Path | None, key: str) -> None:
    for column in COLUMNS[kind]:
        if column not in data.column_names:
            found = ", ".join(data.column_names)
            raise mistake(file, key, NO_VALUE, f"its rows have no {column!r} (they have {found})")


def _check_columns(data: Any, kind: Kind, file: str | Path | None, key: str) -> None:
    _check_names(data, kind, file, key)
    for column in COLUMNS[kind]:
        empty = next((number for number, value in enumerate(data[column]) if not value), None)
        if empty is not None:
            raise mistake(file, key, NO_VALUE, f"row {empty} has an empty {column!r}")
