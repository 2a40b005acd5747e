"""From planned samples to arrays: tokens, masks and positions are written into a step's buffers, once."""

import numpy as np
import numpy.typing as npt

from data.batch import StepBuffers
from data.samples import Piece, PlannedBatch

Int64Array = npt.NDArray[np.int64]


def fill(buffers: StepBuffers, planned: PlannedBatch, samples: slice, *, restart_positions: bool) -> None:
    """Reads some samples of a step into `buffers`, which has a row for each.

    A document's first token is no valid target; with `restart_positions` (document masking) positions count from 0 at
    it. The same holds where a sample goes on in another place of its source. UserError where the shards hold what they
    cannot.
    """
    pieces = planned.pieces(samples)
    read_tokens(buffers.tokens, planned, pieces, samples.start)
    _check_vocabulary(buffers.tokens, planned, pieces, samples.start)
    mark(buffers, _begins(planned, pieces, samples), restart_positions=restart_positions)


def read_tokens(tokens: Int64Array, planned: PlannedBatch, pieces: list[Piece], first_sample: int) -> None:
    """Reads the pieces of samples `first_sample` … into `tokens`, int64 [samples, S + 1]."""
    readers = [source.train for source in planned.stage.sources]
    length, rows = tokens.shape[1] - 1, list(tokens)
    for sample, source, offset, start, size in pieces:
        row = rows[sample - first_sample]
        if size < length:
            end = offset + size
            row = row[offset : end + 1 if end == length else end]
        readers[source].read(start, row)


def _check_vocabulary(tokens: Int64Array, planned: PlannedBatch, pieces: list[Piece], first_sample: int) -> None:
    readers = [source.train for source in planned.stage.sources]
    sizes = [reader.vocab_size for reader in readers if reader.vocab_size is not None]
    if not sizes or tokens.max() < min(sizes):
        return
    for piece in pieces:
        row = tokens[piece.sample - first_sample, piece.offset : piece.offset + piece.length + 1]
        readers[piece.source].check_tokens(row[None], [piece.start])


def _begins(planned: PlannedBatch, pieces: list[Piece], samples: slice) -> Int64Array:
    """The places where a document, or a later piece of a sample, begins, as `mark` wants them."""
    length = planned.stage.sequence_length
    readers = [source.train for source in planned.stage.sources]
    joints: list[int] = []
    begins: list[Int64Array] = []
    for piece, (first, last) in zip(pieces, planned.documents(samples), strict=True):
        place = (piece.sample - samples.start) * length + piece.offset
        if piece.offset:
            joints.append(place)
        if last > first:
            bounds = piece.start + 1, piece.start + piece.length + 1
            begins.append(readers[piece.source].document_starts(first, last, *bounds) + (place - piece.start))
    return np.concatenate([*begins, np.array(joints, dtype=np.int64)])


def mark(buffers: StepBuffers, begins: Int64Array, *, restart_positions: bool) -> None:
    """Writes masks and positions: `begins` are places of tokens (row · S + place in the row, from 1 to S in it) that
    begin something new."""
    rows, length = buffers.shape
    buffers.target_mask[...] = True
    buffers.target_mask.reshape(-1)[begins - 1] = False
    if not restart_positions:
        buffers.position_ids[...] = np.arange(length, dtype=np.int64)
        return
    # A place S in a row is place 0 of the next one, where something begins in any case.
    starts = np.concatenate([np.arange(0, rows * length, length, dtype=np.int64), begins])
    starts.sort()
    lengths = np.diff(starts, append=rows * length)
    begun_at = np.repeat(starts % length, lengths).reshape(rows, length)
    np.subtract(np.arange(length, dtype=np.int64), begun_at, out=buffers.position_ids)
