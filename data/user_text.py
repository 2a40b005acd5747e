"""The user's own text through datatrove's readers: jsonl (also .gz, .zst), parquet, and plain text files.

Lines and documents that cannot be used are counted and named instead of being skipped in silence. Imports datatrove:
import this module where a source is read, not before.
"""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import zstandard
from datatrove.data import Document
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.readers.base import BaseDiskReader

from data.rejected import Rejected
from nanotron_recipes.errors import UserError

NOT_JSON = "not a JSON object"
NO_TEXT = "no text under the text_key"
EMPTY = "empty text"
NOT_UTF8 = "not UTF-8"
_DAMAGED = (EOFError, OSError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException)
"""What reading a file raises that is cut off, or not what its name says."""


class _Counting(BaseDiskReader):
    """Keeps the text alone, and counts what has none."""

    rejected: Rejected

    def get_document_from_dict(self, data: dict[str, Any], source_file: str, id_in_file: int) -> Document | None:
        text = data.get(self.text_key)
        where = f"{self.data_folder.resolve_paths(source_file)}:{id_in_file + 1}"
        if not isinstance(text, str):
            self.rejected.add(NO_TEXT, where)
            self.rejected.keys_seen.update(data)
            return None
        if not text.strip():
            self.rejected.add(EMPTY, where)
            return None
        return Document(text=text, id=where)


class _Jsonl(_Counting, JsonlReader):
    def read_file(self, filepath: str) -> Iterator[Document]:
        import orjson

        # What is not UTF-8 becomes lone surrogates, which make a line that is not JSON instead of ending the file.
        how = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "\n", "compression": self.compression}
        with self.data_folder.open(filepath, "r", **how) as file:
            for number, line in enumerate(file):
                if not line.strip():
                    continue
                try:
                    data = orjson.loads(line)
                except orjson.JSONDecodeError:
                    data = None
                if not isinstance(data, dict):
                    self.rejected.add(NOT_JSON, f"{self.data_folder.resolve_paths(filepath)}:{number + 1}")
                elif document := self.get_document_from_dict(data, filepath, number):
                    yield document


class _Parquet(_Counting, ParquetReader):
    pass


class _TextFiles(_Counting):
    name = "Text files"

    def read_file(self, filepath: str) -> Iterator[Document]:
        with self.data_folder.open(filepath, "rb") as file:
            content = file.read()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            self.rejected.add(NOT_UTF8, self.data_folder.resolve_paths(filepath))
            return
        if document := self.get_document_from_dict({self.text_key: text}, filepath, 0):
            yield document


def read_texts(reader: str, folder: Path, files: Sequence[str], text_key: str, rejected: Rejected) -> Iterator[str]:
    """The texts of `files` (relative to `folder`), in order; what cannot be used goes to `rejected`.

    Raises UserError where a file is damaged.
    """
    step: Any
    if reader == "jsonl":
        step = _Jsonl(str(folder), text_key=text_key)
    elif reader == "parquet":
        # The key twice, so that no other column is read.
        step = _Parquet(str(folder), text_key=text_key, id_key=text_key, read_metadata=False)
    else:
        step = _TextFiles(str(folder))
    step.rejected = rejected
    for file in files:
        try:
            for document in step.read_file(file):
                yield document.text
        except _DAMAGED as error:
            raise UserError(f"{folder / file}: damaged or not a {reader} file ({error})") from None
