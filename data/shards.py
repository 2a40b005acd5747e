"""Windows of tokens out of shards: datatrove's `.ds` (tokens) and `.ds.index` (document ends).

The files of a split are read as one long sequence; a window may span documents and files. Both are mapped into memory.
Sizes are checked when the files are opened, because reading past the end of a truncated memory map kills the process.
"""

import mmap
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data.manifest import ShardFile, Split
from nanotron_recipes.errors import UserError

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

INDEX_ENTRY_BYTES = 8


@dataclass(frozen=True)
class _Shard:
    file: BinaryIO
    """The open file of its tokens, closed with the shard."""
    tokens: npt.NDArray[Any]
    document_ends: Int64Array


class ShardReader:
    """The tokens of one split of a source, as one sequence of `num_tokens` tokens and `num_documents` documents."""

    def __init__(self, folder: Path, split: Split, dtype: str) -> None:
        """Opens and checks the split's files under `folder`; UserError where one is missing or not of its size."""
        self._shards = [_open_shard(folder, file, np.dtype(dtype)) for file in split.files if file.tokens > 0]
        self._token_offsets = _offsets([len(shard.tokens) for shard in self._shards])
        self._document_offsets = _offsets([len(shard.document_ends) for shard in self._shards])
        self._first_tokens: list[int] = self._token_offsets.tolist()
        self._tokens = [shard.tokens for shard in self._shards]
        self._first_documents: list[int] = self._document_offsets.tolist()
        self.num_tokens = int(self._token_offsets[-1])
        self.num_documents = int(self._document_offsets[-1])

    def read(self, start: int, out: Int64Array) -> None:
        """Fills `out` (int64, one row) with the tokens from `start` on."""
        number = bisect_right(self._first_tokens, start) - 1
        first = start - self._first_tokens[number]
        part = self._tokens[number][first : first + len(out)]
        if len(part) == len(out):
            out[...] = part
        else:
            out[: len(part)] = part
            self.read(start + len(part), out[len(part) :])

    def announce(self, start: int, length: int) -> None:
        """Asks the system to have these tokens in memory soon; returns at once, without the interpreter's lock held."""
        number = bisect_right(self._first_tokens, start) - 1
        done = 0
        while done < length:
            shard, first = self._shards[number], start + done - self._first_tokens[number]
            part = min(length - done, len(shard.tokens) - first)
            size = shard.tokens.itemsize
            os.posix_fadvise(shard.file.fileno(), first * size, part * size, os.POSIX_FADV_WILLNEED)
            done, number = done + part, number + 1

    def document_starts(self, first: int, last: int) -> Int64Array:
        """The first tokens of documents `first` … `last` - 1 (counted over all files), int64."""
        parts = []
        number = bisect_right(self._first_documents, first) - 1
        while first < last:
            low = first - self._first_documents[number]
            high = min(last, self._first_documents[number + 1]) - self._first_documents[number]
            ends = self._shards[number].document_ends
            starts = ends[low - 1 : high - 1] if low else np.concatenate([[0], ends[: high - 1]])
            parts.append(starts + self._first_tokens[number])
            first = self._first_documents[number] + high
            number += 1
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, dtype=np.int64)])

    def windows(self, starts: Int64Array, length: int) -> tuple[Int64Array, BoolArray]:
        """The `length` tokens from each of `starts` (int64 [n]) on: tokens int64 [n, length], document starts bool."""
        tokens = np.empty((len(starts), length), dtype=np.int64)
        document_starts = np.zeros((len(starts), length), dtype=np.bool_)
        documents = zip(self.documents_before(starts), self.documents_before(starts + length), strict=True)
        for row, (start, (first, last)) in enumerate(zip(starts.tolist(), documents, strict=True)):
            self.read(start, tokens[row])
            document_starts[row, self.document_starts(int(first), int(last)) - start] = True
        return tokens, document_starts

    def documents_before(self, positions: Int64Array) -> Int64Array:
        """How many documents start before each position (int64, 0 … num_tokens): all of them in one go."""
        numbers = np.searchsorted(self._token_offsets[1:], positions)
        counts = np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            local = positions[mine] - self._token_offsets[number]
            inside = np.searchsorted(self._shards[number].document_ends, local) + (local > 0)
            counts[mine] = self._document_offsets[number] + inside
        return counts

    def valid_targets(self, starts: Int64Array, length: int) -> int:
        """Targets of the windows of `length` tokens from `starts` on that are not the first token of a document."""
        first, last = self.documents_before(starts + 1), self.documents_before(starts + length)
        return len(starts) * (length - 1) - int((last - first).sum())


def _offsets(lengths: Sequence[int]) -> Int64Array:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(lengths, dtype=np.int64))])


def _open_shard(folder: Path, file: ShardFile, dtype: np.dtype[Any]) -> _Shard:
    path = folder / file.name
    index_path = path.with_name(path.name + ".index")
    _check_size(path, file.size)
    _check_size(index_path, file.documents * INDEX_ENTRY_BYTES)
    opened = path.open("rb", buffering=0)
    # Without MADV_RANDOM, under which every 4 KiB of a window cost a page fault of their own.
    tokens = _map(opened, dtype.newbyteorder("<"))
    # Read as signed: searchsorted would otherwise convert the whole index to floating point.
    with index_path.open("rb") as index:
        ends = _map(index, np.dtype("<i8"), mmap.MADV_RANDOM if hasattr(mmap, "MADV_RANDOM") else None)
    if len(tokens) != file.tokens or int(ends[-1]) != file.tokens:
        raise UserError(
            f"{index_path}: the last document ends at token {int(ends[-1])}, "
            f"but {path.name} has {len(tokens)} tokens of {dtype.name}; expected {file.tokens}"
        )
    return _Shard(opened, tokens, ends)


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, but the manifest beside it names it") from None
    if found != expected:
        raise UserError(f"{path}: {found} bytes found, {expected} expected by its manifest")


def _map(file: BinaryIO, dtype: np.dtype[Any], advice: int | None = None) -> npt.NDArray[Any]:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if advice is not None:
        mapped.madvise(advice)
    # A plain array: np.memmap costs over a microsecond more for each row that is cut out of it.
    return np.frombuffer(mapped, dtype=dtype)
