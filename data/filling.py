"""From planned samples to arrays: tokens, masks and positions are written into a step's buffers, once."""

import numpy as np
import numpy.typing as npt

from data.batch import StepBuffers
from data.samples import PlannedStep

Int64Array = npt.NDArray[np.int64]


def fill(buffers: StepBuffers, planned: PlannedStep, samples: slice, *, restart_positions: bool) -> None:
    """Reads some samples of a step into `buffers`, which has a row for each.

    A document's first token is no valid target; with `restart_positions` (document masking) positions count from 0 at
    it. The same holds where a sample goes on in another place of its source.
    """
    length = planned.stage.sequence_length
    readers = [source.train for source in planned.stage.sources]
    begins: list[Int64Array] = []
    joints: list[int] = []
    for piece in planned.pieces(samples):
        row = piece.sample - samples.start
        end = piece.offset + piece.length
        out = buffers.tokens[row, piece.offset : end + 1 if end == length else end]
        reader = readers[piece.source]
        reader.read(piece.start, out)
        place = row * length + piece.offset
        if piece.offset:
            joints.append(place)
        if piece.last_document > piece.first_document:
            starts = reader.document_starts(piece.first_document, piece.last_document)
            begins.append(starts + (place - piece.start))
    inner = np.concatenate([*begins, np.array(joints, dtype=np.int64)])
    mark(buffers, inner, restart_positions=restart_positions)


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
    places = np.arange(rows * length, dtype=np.int64)
    np.subtract(places, np.repeat(starts, lengths), out=buffers.position_ids.reshape(-1))
