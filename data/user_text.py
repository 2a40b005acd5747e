"""The user's own text through datatrove's readers: jsonl (also .gz, .zst), parquet, and plain text files.

Lines and documents that cannot be used are counted and named instead of being skipped in silence. Imports datatrove:
import this module where a source is read, not before.
"""

import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow
import pyarrow.parquet
from datatrove.data import Document
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.readers.base import BaseDiskReader

from data.rejected import EMPTY, NO_TEXT, NOT_JSON, NOT_UTF8, Rejected
from nanotron_recipes.errors import UserError

_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
"""What reading a file raises that is cut off, or not what its name says."""
_PARQUET_ROWS = 256
"""Rows that are in memory at once."""


class _Counting(BaseDiskReader):
    """Keeps the text alone, and counts what has none."""

    rejected: Rejected

    def get_document_from_dict(self, data: dict[str, Any], source_file: str, id_in_file: int) -> Document | None:
        text = data.get(self.text_key)
        where = self.place(source_file, id_in_file)
        if not isinstance(text, str):
            self.rejected.add(NO_TEXT if text is None else f"{_kind(text)} under the text_key, not text", where)
            if self.text_key not in data:
                self.rejected.see_keys(data)
            return None
        if not text.strip():
            self.rejected.add(EMPTY, where)
            return None
        return Document(text=text, id=where)

    def place(self, source_file: str, id_in_file: int) -> str:
        """How a document is named, counted from 1."""
        return f"{self.data_folder.resolve_paths(source_file)}:{id_in_file + 1}"


def _kind(value: object) -> str:
    match value:
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return type(value).__name__


class _Jsonl(_Counting, JsonlReader):
    def read_file(self, filepath: str) -> Iterator[Document]:
        with self._lines(filepath) as lines:
            for number, line in enumerate(lines):
                if not line.strip():
                    continue
                try:
                    data = orjson.loads(line)
                except orjson.JSONDecodeError:
                    data = None
                if not isinstance(data, dict):
                    self.rejected.add(NOT_JSON, self.place(filepath, number))
                elif document := self.get_document_from_dict(data, filepath, number):
                    yield document

    @contextmanager
    def _lines(self, filepath: str) -> Iterator[io.TextIOWrapper]:
        packed_by_zstd = filepath.endswith(".zst")
        compression = None if packed_by_zstd else self.compression
        with self.data_folder.open(filepath, "rb", compression=compression) as file:
            content = _unpacked(file) if packed_by_zstd else file
            # What is not UTF-8 becomes lone surrogates: a line that is not JSON, instead of the end of the file.
            yield io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _unpacked(packed: BinaryIO) -> pyarrow.CompressedInputStream:
    # fsspec reads a zstd file that is cut off up to there and says nothing; this raises.
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd")


class _Parquet(_Counting):
    name = "Parquet"

    def read_file(self, filepath: str) -> Iterator[Document]:
        with self.data_folder.open(filepath, "rb") as file, pyarrow.parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if self.text_key not in columns:
                if table.metadata.num_rows:
                    self.rejected.add(NO_TEXT, self.data_folder.resolve_paths(filepath), table.metadata.num_rows)
                    self.rejected.see_keys(columns)
                return
            number = 0
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[self.text_key]):
                for cell in batch.column(0):
                    if document := self._document(cell, filepath, number):
                        yield document
                    number += 1

    def _document(self, cell: pyarrow.Scalar, filepath: str, number: int) -> Document | None:
        try:
            text = cell.as_py()
        except UnicodeDecodeError:
            self.rejected.add(NOT_UTF8, self.place(filepath, number))
            return None
        return self.get_document_from_dict({self.text_key: text}, filepath, number)


class _TextFiles(_Counting):
    name = "Text files"

    def read_file(self, filepath: str) -> Iterator[Document]:
        with self.data_folder.open(filepath, "rb") as file:
            content = file.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            self.rejected.add(NOT_UTF8, self.data_folder.resolve_paths(filepath))
            return
        if document := self.get_document_from_dict({self.text_key: text}, filepath, 0):
            yield document


def read_texts(reader: str, folder: Path, files: Sequence[str], text_key: str, rejected: Rejected) -> Iterator[str]:
    """The texts of `files` (relative to `folder`), in order; what cannot be used goes to `rejected`.

    Raises UserError where a file is damaged or cannot be read.
    """
    step: Any
    if reader == "jsonl":
        step = _Jsonl(str(folder), text_key=text_key)
    elif reader == "parquet":
        step = _Parquet(str(folder), text_key=text_key)
    else:
        step = _TextFiles(str(folder))
    step.rejected = rejected
    for file in files:
        try:
            for document in step.read_file(file):
                yield document.text
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.strerror:
                raise UserError(f"{folder / file}: cannot be read: {error.strerror}") from None
            raise UserError(f"{folder / file}: damaged or not a {reader} file ({error})") from None
