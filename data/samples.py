"""Some global batches at once: of every sample its source, the pieces of text it reads, and how many
documents begin in them. Only the documents' index is looked at here; tokens are read by who needs them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.blocks import BlockOrder
from data.order import derive_keys, permutations
from data.stages import Stage

Int64Array = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """A stretch of one source's text in a sample."""

    sample: int
    """Number of the sample in the global batch."""
    source: int
    """Number of its source in the stage."""
    offset: int
    """Its first token's place in the sample."""
    start: int
    """Its first token in the source."""
    length: int
    """Its tokens, each of which is an input."""


class Pieces:
    """The pieces of the samples of some batches of one stage, with the documents in them."""

    def __init__(self, stage: Stage, numbers: Int64Array, blocks: Int64Array) -> None:
        """`numbers` (int64 [samples]) are the sources in the stage, `blocks` (int64 [samples, blocks of a sequence])
        what each sample reads of its source: neighbouring blocks are one piece."""
        width, block_length = blocks.shape[1], stage.sources[0].block_length
        begins = np.ones(blocks.shape, dtype=np.bool_)
        begins[:, 1:] = blocks[:, 1:] != blocks[:, :-1] + 1
        places = np.flatnonzero(begins)
        self._stage = stage
        self._numbers = numbers
        self.samples = places // width
        """Of each piece the sample, rising."""
        self.columns = np.empty((len(places), 3), dtype=np.int64)
        """Of each piece offset, start, length."""
        self.columns[:, 0] = places % width * block_length
        self.columns[:, 1] = blocks.ravel()[places] * block_length
        self.columns[:, 2] = np.diff(places, append=blocks.size) * block_length

    @cached_property
    def documents(self) -> Int64Array:
        """Of each piece (int64 [pieces, 2]) the first document of its source that begins after its first token, and the
        first one that begins after its last target. Looked up in the index when it is first asked for; UserError where
        that cannot be."""
        starts = self.columns[:, 1]
        is_last = np.append(self.samples[1:] != self.samples[:-1], True)
        positions = np.stack([starts + 1, starts + self.columns[:, 2] + is_last])
        found = np.empty_like(positions)
        for number, mine in _grouped(self._numbers[self.samples]):
            asked, reader = positions[:, mine], self._stage.sources[number].train
            first, last = found[:, mine] = reader.documents_before(asked.ravel()).reshape(asked.shape)
            for start in asked[0][(last < first) | (last - first > self.columns[mine, 2])].tolist():
                raise reader.not_rising(start - 1)
        return found.T


@dataclass(frozen=True)
class PlannedBatch:
    """A global batch in its final order."""

    stage: Stage
    numbers: Int64Array
    """Of each sample (int64 [global batch]) the number of its source in the stage."""
    blocks: Int64Array
    """Of each sample the blocks of that source, int64 [global batch, blocks of a sequence]."""
    first_sample: int
    """The number of its first sample in `all_pieces`."""
    all_pieces: Pieces

    @property
    def num_valid_targets(self) -> int:
        """Targets of the global batch that are no document's first token; a later piece of a sample follows something
        else, so its first token is none either."""
        size = len(self.numbers)
        mine = self._pieces_of(slice(0, size))
        documents = self.all_pieces.documents[mine]
        masked = int((documents[:, 1] - documents[:, 0]).sum()) + len(documents) - size
        return size * self.stage.sequence_length - masked

    def pieces(self, samples: slice) -> list[Piece]:
        """The pieces of some samples in their order."""
        mine = self._pieces_of(samples)
        columns = self.all_pieces.columns[mine]
        if self.blocks.shape[1] == 1:  # every sample is one piece
            sources, starts = self.numbers[samples].tolist(), columns[:, 1].tolist()
            fields = zip(
                count(samples.start), sources, repeat(0), starts, repeat(self.stage.sequence_length), strict=False
            )
        else:
            numbers = self.all_pieces.samples[mine] - self.first_sample
            fields = zip(numbers.tolist(), self.numbers[numbers].tolist(), *columns.T.tolist(), strict=True)
        return list(map(Piece._make, fields))

    def documents(self, samples: slice) -> list[tuple[int, int]]:
        """Of the same pieces, which documents of the source begin in them: the first one and the one after the last."""
        first, last = self.all_pieces.documents[self._pieces_of(samples)].T.tolist()
        return list(zip(first, last, strict=True))

    def _pieces_of(self, samples: slice) -> slice:
        bounds = (self.first_sample + samples.start, self.first_sample + samples.stop)
        if self.blocks.shape[1] == 1:
            return slice(*bounds)
        return slice(*np.searchsorted(self.all_pieces.samples, bounds).tolist())


def plan_batches(
    stage: Stage, orders: dict[str, BlockOrder], first_batch: int, num_batches: int, global_batch_size: int
) -> list[PlannedBatch]:
    """Plans batches `first_batch` … of one stage together: numpy works on many samples as fast as on few."""
    size = global_batch_size
    # The mixture is even over any stretch of samples, so ranks would see their own repeating pattern of sources
    # without one more permutation inside the batch.
    keys = derive_keys(stage.seed, "batch", last=range(first_batch, first_batch + num_batches))
    places = permutations(size, keys)
    firsts = (np.arange(num_batches, dtype=np.int64) + (first_batch - stage.first_batch)) * size
    numbers, before = stage.mixture.at((places + firsts[:, None]).ravel())
    width = stage.sequence_length // stage.sources[0].block_length
    positions = before[:, None] * width + np.arange(width, dtype=np.int64)
    blocks = np.empty_like(positions)
    for number, mine in _grouped(numbers):
        order = orders[stage.sources[number].name]
        blocks[mine] = order.blocks(positions[mine] + stage.read_before[number])
    pieces = Pieces(stage, numbers, blocks)
    return [
        PlannedBatch(stage, numbers[first : first + size], blocks[first : first + size], first, pieces)
        for first in range(0, num_batches * size, size)
    ]


def _grouped(numbers: Int64Array) -> Iterator[tuple[int, Int64Array]]:
    """Each number that there is, and where."""
    for number in np.unique(numbers).tolist():
        yield number, np.flatnonzero(numbers == number)
