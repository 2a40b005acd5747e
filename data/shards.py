"""Windows of tokens out of memory-mapped shards: datatrove's `.ds` (tokens) and `.ds.index` (document ends).

The files of a split are read as one long sequence; a window may span documents and files. Sizes are checked when the
files are opened, because reading past the end of a truncated memory map kills the process.
"""

import mmap
from collections.abc import Sequence
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
    path: Path
    tokens: npt.NDArray[Any]
    document_ends: Int64Array


class ShardReader:
    """The tokens of one split of a source, as one sequence of `num_tokens` tokens and `num_documents` documents."""

    def __init__(self, folder: Path, split: Split, dtype: str, vocab_size: int | None = None) -> None:
        """Opens and checks the split's files under `folder`; UserError where one is missing or not of its size.

        With `vocab_size` every token that is read has to be smaller.
        """
        self._shards = [_open_shard(folder, file, np.dtype(dtype)) for file in split.files]
        self._vocab_size = vocab_size
        self._token_offsets = _offsets([len(shard.tokens) for shard in self._shards])
        self._document_offsets = _offsets([len(shard.document_ends) for shard in self._shards])
        self.num_tokens = int(self._token_offsets[-1])
        self.num_documents = int(self._document_offsets[-1])

    def windows(self, starts: Int64Array, length: int) -> tuple[Int64Array, BoolArray]:
        """The `length` tokens from each of `starts` (int64 [n]) on: tokens int64 [n, length], document starts bool.

        Raises UserError where the shards hold what they cannot: a token beyond the vocabulary, document ends that do
        not rise.
        """
        tokens = np.empty((len(starts), length), dtype=np.int64)
        document_starts = np.zeros((len(starts), length), dtype=np.bool_)
        for row, start in enumerate(starts.tolist()):
            filled = 0
            number = int(np.searchsorted(self._token_offsets, start, side="right")) - 1
            while filled < length:
                shard = self._shards[number]
                first = start + filled - int(self._token_offsets[number])
                last = min(first + length - filled, len(shard.tokens))
                tokens[row, filled : filled + last - first] = shard.tokens[first:last]
                low, high = np.searchsorted(shard.document_ends, (first, last))
                ends = shard.document_ends[low:high]
                if len(ends) and (ends[0] < first or ends[-1] >= last or (ends[1:] <= ends[:-1]).any()):
                    raise _not_rising(shard, first)
                document_starts[row, ends - (first - filled)] = True
                if first == 0:
                    document_starts[row, filled] = True
                filled += last - first
                number += 1
        if self._vocab_size is not None and tokens.size and tokens.max() >= self._vocab_size:
            raise self._foreign_token(tokens, starts, self._vocab_size)
        return tokens, document_starts

    def _foreign_token(self, tokens: Int64Array, starts: Int64Array, vocab_size: int) -> UserError:
        row, column = np.argwhere(tokens >= vocab_size)[0]
        position = int(starts[row] + column)
        number = int(np.searchsorted(self._token_offsets, position, side="right")) - 1
        return UserError(
            f"{self._shards[number].path}: token {tokens[row, column]} at position "
            f"{position - int(self._token_offsets[number])}, but the vocabulary has {vocab_size} entries: "
            f"{_DAMAGED}"
        )

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
        for start in starts[(last < first) | (last - first >= length)].tolist():
            number = int(np.searchsorted(self._token_offsets, start, side="right")) - 1
            raise _not_rising(self._shards[number], start - int(self._token_offsets[number]))
        return len(starts) * (length - 1) - int((last - first).sum())


def _offsets(lengths: Sequence[int]) -> Int64Array:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(lengths, dtype=np.int64))])


def _not_rising(shard: _Shard, position: int) -> UserError:
    return UserError(f"{shard.path}.index: document ends after token {position} do not rise: {_DAMAGED}")


def _open_shard(folder: Path, file: ShardFile, dtype: np.dtype[Any]) -> _Shard:
    path = folder / file.name
    index_path = path.with_name(path.name + ".index")
    try:
        _check_size(path, file.tokens * dtype.itemsize)
        _check_size(index_path, file.documents * INDEX_ENTRY_BYTES)
        tokens = _map(path, dtype.newbyteorder("<"))
        # Read as signed: searchsorted would otherwise convert the whole index to floating point.
        ends = _map(index_path, np.dtype("<i8"))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file, but the manifest beside it names it") from None
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from None
    if int(ends[-1]) != file.tokens:
        raise UserError(
            f"{index_path}: the last document ends at token {int(ends[-1])}, "
            f"but {path.name} has {len(tokens)} tokens of {dtype.name}"
        )
    return _Shard(path, tokens, ends)


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size
    if found != expected:
        raise UserError(f"{path}: {found} bytes found, {expected} expected by its manifest")


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_RANDOM)
    # A plain array: np.memmap costs over a microsecond more for each row that is cut out of it.
    return np.frombuffer(mapped, dtype=dtype)
