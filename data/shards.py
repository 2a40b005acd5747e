"""Windows of tokens out of shards: datatrove's `.ds` (tokens) and `.ds.index` (document ends).

The files of a split are read as one long sequence; a window may span documents and files. Both are mapped into memory.
Sizes are checked when the files are opened, because reading past the end of a truncated memory map kills the process.
"""

import mmap
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.manifest import ShardFile, Split
from nanotron_recipes.errors import UserError

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

INDEX_ENTRY_BYTES = 8
_DAMAGED = "the file is damaged; remove its folder and tokenize again"


@dataclass(frozen=True)
class _Shard:
    mapping: mmap.mmap
    """The file of its tokens."""
    tokens: npt.NDArray[Any]
    document_ends: Int64Array


class ShardReader:
    """The tokens of one split of a source, as one sequence of `num_tokens` tokens and `num_documents` documents."""

    def __init__(
        self,
        folder: Path,
        split: Split,
        dtype: str,
        vocab_size: int | None = None,
        present: Collection[int] | None = None,
    ) -> None:
        """Opens and checks the split's files under `folder`; UserError where one is missing or not of its size.

        With `vocab_size` every token that is read has to be smaller. With `present` only the files of these numbers are
        here, and nothing is read from the others.
        """
        numbers = range(len(split.files)) if present is None else present
        opened = {number: _open_shard(folder, split.files[number], np.dtype(dtype)) for number in numbers}
        self._paths = [folder / file.name for file in split.files]
        self._shards = [opened.get(number) for number in range(len(split.files))]
        self.vocab_size = vocab_size
        self._token_offsets = _offsets([file.tokens for file in split.files])
        self._document_offsets = _offsets([file.documents for file in split.files])
        self._first_tokens: list[int] = self._token_offsets.tolist()
        nothing = np.empty(0, dtype=dtype)
        self._tokens = [shard.tokens if shard is not None else nothing for shard in self._shards]
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
            self._shard(number)
            out[: len(part)] = part
            self.read(start + len(part), out[len(part) :])

    def announce(self, start: int, length: int) -> None:
        """Asks the system to have these tokens in memory soon; returns without waiting for them."""
        number = bisect_right(self._first_tokens, start) - 1
        while length:
            shard, first = self._shard(number), start - self._first_tokens[number]
            part = min(length, len(shard.tokens) - first)
            begin, end = first * shard.tokens.itemsize, (first + part) * shard.tokens.itemsize
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            shard.mapping.madvise(mmap.MADV_WILLNEED, page, end - page)
            start, length, number = start + part, length - part, number + 1

    def document_starts(self, first: int, last: int, start: int, end: int) -> Int64Array:
        """The first tokens of documents `first` … `last` - 1 (counted over all files), int64: those that begin from
        token `start` on before token `end`. UserError where the index says otherwise."""
        parts = [np.empty(0, dtype=np.int64)]
        asked, number = first, bisect_right(self._first_documents, first) - 1
        while asked < last:
            low = asked - self._first_documents[number]
            high = min(last, self._first_documents[number + 1]) - self._first_documents[number]
            ends = self._shard(number).document_ends
            starts = ends[low - 1 : high - 1] if low else np.concatenate([[0], ends[: high - 1]])
            parts.append(starts + self._first_tokens[number])
            asked, number = self._first_documents[number] + high, number + 1
        found = parts[1] if len(parts) == 2 else np.concatenate(parts)
        if last < first or (len(found) and (found[0] < start or found[-1] >= end or (found[1:] <= found[:-1]).any())):
            raise self.not_rising(start)
        return found

    def windows(self, starts: Int64Array, length: int) -> tuple[Int64Array, BoolArray]:
        """The `length` tokens from each of `starts` (int64 [n]) on: tokens int64 [n, length], document starts bool.

        Raises UserError where the shards hold what they cannot: a token beyond the vocabulary, document ends that do
        not rise.
        """
        tokens = np.empty((len(starts), length), dtype=np.int64)
        document_starts = np.zeros((len(starts), length), dtype=np.bool_)
        documents = zip(self.documents_before(starts), self.documents_before(starts + length), strict=True)
        for row, (start, (first, last)) in enumerate(zip(starts.tolist(), documents, strict=True)):
            self.read(start, tokens[row])
            document_starts[row, self.document_starts(int(first), int(last), start, start + length) - start] = True
        self.check_tokens(tokens, starts.tolist())
        return tokens, document_starts

    def check_tokens(self, tokens: Int64Array, starts: Sequence[int]) -> None:
        """UserError where a row of `tokens` (int64 [n, length]), read from the same of `starts` on, has a token beyond
        the vocabulary."""
        if self.vocab_size is None or not tokens.size or tokens.max() < self.vocab_size:
            return
        row, column = np.argwhere(tokens >= self.vocab_size)[0].tolist()
        position = starts[row] + column
        number = bisect_right(self._first_tokens, position) - 1
        raise UserError(
            f"{self._paths[number]}: token {tokens[row, column]} at position "
            f"{position - self._first_tokens[number]}, but the vocabulary has {self.vocab_size} entries: {_DAMAGED}"
        )

    def documents_before(self, positions: Int64Array) -> Int64Array:
        """How many documents start before each position (int64, 0 … num_tokens): all of them in one go."""
        numbers = np.searchsorted(self._token_offsets[1:], positions)
        counts = np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            local = positions[mine] - self._token_offsets[number]
            inside = np.searchsorted(self._shard(number).document_ends, local) + (local > 0)
            counts[mine] = self._document_offsets[number] + inside
        return counts

    def is_document_start(self, position: int) -> bool:
        """Whether the token at `position` (0 … num_tokens - 1) is the first of its document: no other file than the one
        it is in is looked at."""
        number = bisect_right(self._first_tokens, position) - 1
        local = position - self._first_tokens[number]
        ends = self._shard(number).document_ends
        return local == 0 or bool(ends[np.searchsorted(ends, local)] == local)

    def valid_targets(self, starts: Int64Array, length: int) -> int:
        """Targets of the windows of `length` tokens from `starts` on that are not the first token of a document."""
        first, last = self.documents_before(starts + 1), self.documents_before(starts + length)
        for start in starts[(last < first) | (last - first >= length)].tolist():
            raise self.not_rising(start)
        return len(starts) * (length - 1) - int((last - first).sum())

    def _shard(self, number: int) -> _Shard:
        shard = self._shards[number]
        if shard is None:
            raise UserError(f"{self._paths[number]}: not on this machine, and the run reads it")
        return shard

    def not_rising(self, start: int) -> UserError:
        """What to raise where the index around token `start` cannot be."""
        number = bisect_right(self._first_tokens, start) - 1
        position = start - self._first_tokens[number]
        path = self._paths[number]
        return UserError(f"{path}.index: document ends after token {position} do not rise: {_DAMAGED}")


def _offsets(lengths: Sequence[int]) -> Int64Array:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(lengths, dtype=np.int64))])


def _open_shard(folder: Path, file: ShardFile, dtype: np.dtype[Any]) -> _Shard:
    path = folder / file.name
    index_path = path.with_name(path.name + ".index")
    try:
        _check_size(path, file.tokens * dtype.itemsize)
        _check_size(index_path, file.documents * INDEX_ENTRY_BYTES)
        # Without MADV_RANDOM, under which every 4 KiB of a window cost a page fault of their own.
        mapping = _map(path)
        # Plain arrays: np.memmap costs over a microsecond more for each row that is cut out of it.
        tokens = np.frombuffer(mapping, dtype=dtype.newbyteorder("<"))
        # Read as signed: searchsorted would otherwise convert the whole index to floating point.
        index = _map(index_path)
        if hasattr(mmap, "MADV_RANDOM"):
            index.madvise(mmap.MADV_RANDOM)
        ends = np.frombuffer(index, dtype="<i8")
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file, but the manifest beside it names it") from None
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from None
    if int(ends[-1]) != file.tokens:
        raise UserError(
            f"{index_path}: the last document ends at token {int(ends[-1])}, "
            f"but {path.name} has {len(tokens)} tokens of {dtype.name}"
        )
    return _Shard(mapping, tokens, ends)


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size
    if found != expected:
        raise UserError(
            f"{path}: {found} bytes found, {expected} expected by its manifest; bring the file back, or remove its "
            "source's folder and run `nanotron-recipes tokenize RECIPE`"
        )


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
