"""What is in a step's batch, document by document, for people to look at."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from data.plan import DataPlan

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DocumentPart:
    """What one sample has of one document."""

    sample: int
    """Number of the sample in the global batch."""
    source: str
    document: int
    """Number of the document in its source, over all files."""
    first: int
    """Place of its first token in the sample."""
    tokens: Int64Array
    """The inputs from there on, int64."""
    begins: bool
    """Whether the document begins here, not before the sample."""
    masked: Int64Array
    """Places in the sample whose target does not count, int64."""


def document_parts(plan: DataPlan, step: int, samples: range) -> Iterator[DocumentPart]:
    """What some samples of the global batch of step `step` (from 1) are made of, in their order."""
    planned = plan.planned(step)
    batch = plan.step(step, dp=1, dp_rank=0, num_micro_batches=1, micro_batch_size=plan.global_batch_size)
    arrays = batch.micro_batches[0]
    rows = slice(samples.start, samples.stop)
    for piece, (first_document, last_document) in zip(planned.pieces(rows), planned.documents(rows), strict=True):
        reader = planned.stage.sources[piece.source].train
        end = piece.offset + piece.length
        starts = reader.document_starts(first_document, last_document, piece.start + 1, piece.start + piece.length + 1)
        starts = starts - piece.start + piece.offset
        borders = [piece.offset, *starts[starts < end].tolist(), end]
        begins_here = reader.is_document_start(piece.start)
        for number, (first, last) in enumerate(pairwise(borders)):
            yield DocumentPart(
                sample=piece.sample,
                source=batch.sources[piece.sample],
                document=first_document - 1 + number,
                first=first,
                tokens=arrays.input_ids[piece.sample, first:last],
                begins=number > 0 or begins_here,
                masked=first + np.flatnonzero(~arrays.target_mask[piece.sample, first:last]),
            )
