"""What a training step receives: token windows cut into inputs, targets, masks and positions (numpy only)."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward and backward pass on one data-parallel rank."""

    tokens: Int64Array
    """Windows of S + 1 tokens, int64 [micro_batch_size, S + 1]."""
    target_mask: BoolArray
    """True where the target counts in the loss; False where it is the first token of a document. [.., S]."""
    position_ids: Int64Array
    """Position inside the document where documents are masked from each other (0 starts one), else 0 … S-1; int64
    [.., S]."""

    @property
    def input_ids(self) -> Int64Array:
        """Tokens 0 … S-1 of each window, int64 [.., S], a view."""
        return self.tokens[:, :-1]

    @property
    def target_ids(self) -> Int64Array:
        """Tokens 1 … S of each window, a view: target_ids[:, i] is to be predicted from input_ids[:, : i + 1]."""
        return self.tokens[:, 1:]


class Allocate(Protocol):
    """Makes an array whose contents do not matter, such as numpy.empty does."""

    def __call__(self, shape: tuple[int, ...], dtype: type[np.int64 | np.bool_], /) -> npt.NDArray[Any]: ...


@dataclass(frozen=True)
class StepBuffers:
    """Memory for all sequences of a rank's step, which can be filled again for a later one."""

    tokens: Int64Array
    """int64 [sequences, S + 1]."""
    target_mask: BoolArray
    """bool [sequences, S]."""
    position_ids: Int64Array
    """int64 [sequences, S]."""

    @classmethod
    def allocated(cls, sequences: int, length: int, allocate: Allocate = np.empty) -> "StepBuffers":
        """Buffers for so many sequences of `length` tokens."""
        return cls(
            allocate((sequences, length + 1), np.int64),
            allocate((sequences, length), np.bool_),
            allocate((sequences, length), np.int64),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Sequences and their length."""
        return self.target_mask.shape

    def micro_batch(self, rows: slice) -> MicroBatch:
        """Some of the sequences, as views."""
        return MicroBatch(self.tokens[rows], self.target_mask[rows], self.position_ids[rows])


@dataclass(frozen=True)
class StepBatch:
    """What one data-parallel rank needs for one optimizer step."""

    micro_batches: list[MicroBatch]
    """This rank's micro-batches in the order in which they are run."""
    num_valid_targets: int
    """How many targets of the GLOBAL batch have a true mask; the same on every rank, known without communication."""
    stage: str
    """Name of the data stage that the step belongs to."""
    sources: list[str]
    """Name of the source of each of this rank's samples, in the order of the micro-batches' rows."""


def micro_batch_from_windows(tokens: Int64Array, starts: BoolArray, *, restart_positions: bool) -> MicroBatch:
    """Cuts windows of S + 1 tokens into a micro-batch.

    `tokens` is int64 [n, S + 1]; `starts` is bool [n, S + 1], True where a token is the first of its document.
    With `restart_positions` (document masking) positions count from 0 at each document start that lies inside the
    window; a document that began before the window counts from 0 at the window's beginning.
    """
    length = tokens.shape[1] - 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int64), (tokens.shape[0], length))
    if restart_positions:
        last_start = np.maximum.accumulate(np.where(starts[:, :-1], positions, 0), axis=1)
        positions = positions - last_start
    return MicroBatch(
        tokens=tokens,
        target_mask=~starts[:, 1:],
        position_ids=np.ascontiguousarray(positions),
    )


def fill_rows(batch: MicroBatch, rows: int) -> MicroBatch:
    """The micro-batch filled up to `rows` rows with token 0 and a mask that is False everywhere."""
    missing = rows - batch.input_ids.shape[0]
    assert missing >= 0, "a micro-batch cannot shrink"
    if missing == 0:
        return batch
    length = batch.input_ids.shape[1]
    positions = np.tile(np.arange(length, dtype=np.int64), (missing, 1))
    return MicroBatch(
        tokens=np.concatenate([batch.tokens, np.zeros((missing, length + 1), dtype=np.int64)]),
        target_mask=np.concatenate([batch.target_mask, np.zeros((missing, length), dtype=np.bool_)]),
        position_ids=np.concatenate([batch.position_ids, positions]),
    )
