"""Files of text through datatrove's readers: jsonl (also .gz, .zst), parquet, and plain text, or parts of them.

Lines and documents that cannot be used are counted and named instead of being skipped in silence. Imports datatrove:
import this module where a source is read, not before.
"""

import gzip
import io
import json
import lzma
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, BinaryIO, cast

import orjson
import pyarrow
import pyarrow.parquet
from datatrove.data import Document
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.readers.base import BaseDiskReader

from data.rejected import EMPTY, NO_TEXT, NO_UNICODE, NOT_JSON, NOT_UTF8, Rejected
from data.text_files import open_folder, remote_reason
from data.text_part import Part
from nanotron_recipes.errors import UserError
from nanotron_recipes.urls import is_url

_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
"""What reading a file raises that is cut off, or not what its name says."""
_PARQUET_ROWS = 256
"""Rows that are in memory at once."""
_BUFFER = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _Counting(BaseDiskReader):
    """Keeps the text alone, and counts what has none."""

    rejected: Rejected
    done = 0
    """Bytes of the present part that have been read."""

    @abstractmethod
    def read_part(self, part: Part) -> Iterator[Document]:
        """The documents of a part of a file."""

    def read_file(self, filepath: str) -> Iterator[Document]:
        """All documents of a file."""
        return self.read_part(Part(folder=self.data_folder.path, file=filepath, size=0))

    def get_document_from_dict(self, data: dict[str, Any], source_file: str, id_in_file: int | str) -> Document | None:
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
        try:
            text.encode()
        except UnicodeEncodeError:
            self.rejected.add(NO_UNICODE, where)
            return None
        return Document(text=text, id=where)

    def place(self, source_file: str, id_in_file: int | str) -> str:
        """How a document is named: by its number from 1 on, or by where it begins."""
        name = self.data_folder.resolve_paths(source_file)
        return f"{name}: {id_in_file}" if isinstance(id_in_file, str) else f"{name}:{id_in_file + 1}"


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
    def read_part(self, part: Part) -> Iterator[Document]:
        with self._opened(part.file) as (content, packed):
            position = _to_first_line(content, part.first) if part.first else 0
            for number, line in enumerate(content):
                begin, position = position, position + len(line)
                if part.end is not None and begin >= part.end:
                    break
                self.done = packed.tell() if packed else position - part.first
                if number == 0 and begin == 0:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if not line.strip():
                    continue
                # Nobody counts the lines before a part: its documents are told by the byte that they begin at.
                where: int | str = f"byte {begin}" if part.first else number
                data = _object_in(line)
                if isinstance(data, str):
                    self.rejected.add(data, self.place(part.file, where))
                elif document := self.get_document_from_dict(data, part.file, where):
                    yield document

    @contextmanager
    def _opened(self, file: str) -> Iterator[tuple[io.BufferedReader, BinaryIO | None]]:
        """The lines of a file, and where it is packed the packed file."""
        with self.data_folder.open(file, "rb") as opened:
            if file.endswith(".zst"):
                # fsspec reads a zstd file that is cut off up to there and says nothing; this raises.
                content: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(opened, mode="r"), "zstd")
            elif file.endswith(".gz"):
                content = gzip.GzipFile(fileobj=opened)
            else:
                yield _buffered(opened), None
                return
            yield _buffered(content), opened


def _object_in(line: bytes) -> dict[str, Any] | str:
    """The JSON object of a line, or the reason why it has none."""
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            data = json.loads(line.decode())  # reads what Python's own writes: NaN, and halves of surrogate pairs
        except UnicodeDecodeError:
            return NOT_UTF8
        except (ValueError, RecursionError):
            return NOT_JSON
    return data if isinstance(data, dict) else NOT_JSON


def _buffered(file: Any) -> io.BufferedReader:
    """Lines are found in C, whatever kind of file it is."""
    raw = file if hasattr(file, "readinto") else file.f
    return io.BufferedReader(cast(io.RawIOBase, raw), _BUFFER)


def _to_first_line(content: io.BufferedReader, first: int) -> int:
    """Goes to the first line that begins at or behind byte `first`; its place."""
    content.seek(first - 1)
    return first - 1 + len(content.readline())


class _Parquet(_Counting):
    name = "Parquet"

    def read_part(self, part: Part) -> Iterator[Document]:
        with self.data_folder.open(part.file, "rb") as file, pyarrow.parquet.ParquetFile(file) as table:
            columns, metadata = table.schema_arrow.names, table.metadata
            groups = range(part.first, metadata.num_row_groups if part.end is None else part.end)
            rows = sum(metadata.row_group(group).num_rows for group in groups)
            if self.text_key not in columns:
                if rows:
                    self.rejected.add(NO_TEXT, self.data_folder.resolve_paths(part.file), rows)
                    self.rejected.see_keys(columns)
                return
            first = number = sum(metadata.row_group(group).num_rows for group in range(part.first))
            for batch in table.iter_batches(_PARQUET_ROWS, row_groups=list(groups), columns=[self.text_key]):
                self.done = part.size * (number - first) // rows
                for cell in batch.column(0):
                    if document := self._document(cell, part.file, number):
                        yield document
                    number += 1

    def _document(self, cell: pyarrow.Scalar, filepath: str, number: int) -> Document | None:
        try:
            text = cell.as_py()
        except UnicodeDecodeError:
            self.rejected.add(NOT_UTF8, self.place(filepath, number))
            return None
        return self.get_document_from_dict({self.text_key: text}, filepath, number)


def row_group_sizes(whole: Part, text_key: str) -> list[int]:
    """How large the text in each row group of a parquet file is (all of the group where no column is called so).

    Raises UserError where the file is damaged or cannot be read.
    """
    with (
        _mistakes(whole, "parquet"),
        open_folder(whole.folder).open(whole.file, "rb") as file,
        pyarrow.parquet.ParquetFile(file) as table,
    ):
        groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
        return [_text_bytes(group, text_key) for group in groups]


def _text_bytes(group: Any, text_key: str) -> int:
    columns = [group.column(number) for number in range(group.num_columns)]
    found = [column.total_compressed_size for column in columns if column.path_in_schema == text_key]
    return int(found[0]) if found else int(group.total_byte_size)


class _TextFiles(_Counting):
    name = "Text files"

    def read_part(self, part: Part) -> Iterator[Document]:
        with self.data_folder.open(part.file, "rb") as file:
            content = file.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            self.rejected.add(NOT_UTF8, self.data_folder.resolve_paths(part.file))
            return
        if document := self.get_document_from_dict({self.text_key: text}, part.file, 0):
            yield document


def read_texts(reader: str, parts: Sequence[Part], text_key: str, rejected: Rejected) -> Iterator[str]:
    """The texts of parts of files, in order; what cannot be used goes to `rejected`, which is told how far it is.

    Raises UserError where a file is damaged or cannot be read.
    """
    before = 0
    for folder, of_folder in groupby(parts, key=lambda part: part.folder):
        step = _step(reader, folder, text_key, rejected)
        for part in of_folder:
            with _mistakes(part, reader):
                for document in step.read_part(part):
                    rejected.bytes_read = before + min(step.done, part.size)
                    yield document.text
            before += part.size
            step.done = 0
    rejected.bytes_read = before


def _step(reader: str, folder: str, text_key: str, rejected: Rejected) -> _Counting:
    step: Any
    if reader == "jsonl":
        step = _Jsonl(open_folder(folder), text_key=text_key)
    elif reader == "parquet":
        step = _Parquet(open_folder(folder), text_key=text_key)
    else:
        step = _TextFiles(open_folder(folder))
    step.rejected = rejected
    return step


@contextmanager
def _mistakes(part: Part, reader: str) -> Iterator[None]:
    """UserError that names the file for what opening and reading it raises."""
    is_remote = is_url(part.folder)
    try:
        yield
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{part.where}: cannot be read: {error.strerror}") from None
        if is_remote and isinstance(error, OSError):
            raise UserError(f"{part.where}: cannot be read: {remote_reason(error)}") from None
        raise UserError(f"{part.where}: damaged or not a {reader} file ({error})") from None
    except Exception as error:
        if is_remote:  # what a network may do has too many names
            raise UserError(f"{part.where}: cannot be read: {remote_reason(error)}") from None
        raise
