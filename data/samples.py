"""The global batches of some steps at once: of every sample its source, the pieces of text it reads, and how many
documents begin in them. Only the documents' index is looked at here; tokens are read by who needs them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.blocks import BlockOrder
from data.order import derive_key, permutations
from data.stages import Stage

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """A stretch of one source's text in a sample."""

    sample: int
    """Number of the sample in the global batch."""
    offset: int
    """Its first token's place in the sample."""
    source: int
    """Number of its source in the stage."""
    start: int
    """Its first token in the source."""
    length: int
    """Its tokens, each of which is an input."""
    first_document: int
    """Of the documents that begin after its first token, up to the target of its last one, the number in the source."""
    last_document: int
    """The first document after them."""


@dataclass(frozen=True)
class PlannedStep:
    """The global batch of a step in its final order."""

    stage: Stage
    numbers: Int64Array
    """Of each sample (int64 [global batch]) the number of its source in the stage."""
    blocks: Int64Array
    """Of each sample the blocks of that source, int64 [global batch, blocks of a sequence]."""
    num_valid_targets: int
    """Targets that are no document's first token."""
    samples: Int64Array
    """Of each piece the sample, rising; a sample is one piece where its blocks are neighbours in their source."""
    columns: Int64Array
    """Of each piece (int64 [pieces, 5]) offset, start, length, first_document, last_document."""

    def pieces(self, samples: slice) -> Iterator[Piece]:
        """The pieces of some samples in their order."""
        low, high = np.searchsorted(self.samples, (samples.start, samples.stop)).tolist()
        numbers = self.numbers.tolist()
        for sample, columns in zip(self.samples[low:high].tolist(), self.columns[low:high].tolist(), strict=True):
            offset, start, length, first, last = columns
            yield Piece(sample, offset, numbers[sample], start, length, first, last)


def plan_steps(
    stage: Stage, orders: dict[str, BlockOrder], first_step: int, num_steps: int, global_batch_size: int
) -> list[PlannedStep]:
    """Plans steps `first_step` … of one stage together: numpy works on many samples as fast as on few."""
    size = global_batch_size
    steps = range(first_step, first_step + num_steps)
    # The mixture is even over any stretch of samples, so ranks would see their own repeating pattern of sources
    # without one more permutation inside the batch.
    places = permutations(size, [derive_key(stage.seed, "batch", step) for step in steps])
    firsts = (np.arange(num_steps, dtype=np.int64) + (first_step - stage.first_step)) * size
    numbers, before = stage.mixture.at((places + firsts[:, None]).ravel())
    width = stage.sequence_length // stage.sources[0].block_length
    positions = before[:, None] * width + np.arange(width, dtype=np.int64)
    blocks = np.empty_like(positions)
    groups = [(number, np.flatnonzero(numbers == number)) for number in np.unique(numbers).tolist()]
    for number, mine in groups:
        order = orders[stage.sources[number].name]
        blocks[mine] = order.blocks(positions[mine] + stage.read_before[number])
    samples, columns = _pieces(blocks, stage.sources[0].block_length)
    owners = numbers[samples]
    is_last = np.append(samples[1:] != samples[:-1], True)
    for number in np.unique(numbers).tolist():
        mine = np.flatnonzero(owners == number)
        starts, ends = columns[mine, 1] + 1, columns[mine, 1] + columns[mine, 2] + is_last[mine]
        both = stage.sources[number].train.documents_before(np.concatenate([starts, ends]))
        columns[mine, 3], columns[mine, 4] = both[: len(mine)], both[len(mine) :]
    return [
        _step_of(stage, numbers, blocks, samples, columns, slice(i * size, (i + 1) * size)) for i in range(num_steps)
    ]


def _pieces(blocks: Int64Array, block_length: int) -> tuple[Int64Array, Int64Array]:
    """The sample, and the columns still without documents, of each run of neighbouring blocks in a sample."""
    count, width = blocks.shape
    begins = np.ones((count, width), dtype=np.bool_)
    begins[:, 1:] = blocks[:, 1:] != blocks[:, :-1] + 1
    places = np.flatnonzero(begins)
    columns = np.empty((len(places), 5), dtype=np.int64)
    columns[:, 0] = places % width * block_length
    columns[:, 1] = blocks.ravel()[places] * block_length
    columns[:, 2] = np.diff(places, append=count * width) * block_length
    return places // width, columns


def _step_of(
    stage: Stage, numbers: Int64Array, blocks: Int64Array, samples: Int64Array, columns: Int64Array, part: slice
) -> PlannedStep:
    low, high = np.searchsorted(samples, (part.start, part.stop)).tolist()
    mine = columns[low:high]
    batch = part.stop - part.start
    # The first token of a later piece of a sample follows something else: it is no valid target either.
    masked = int((mine[:, 4] - mine[:, 3]).sum()) + (high - low) - batch
    return PlannedStep(
        stage=stage,
        numbers=numbers[part],
        blocks=blocks[part],
        num_valid_targets=batch * stage.sequence_length - masked,
        samples=samples[low:high] - part.start,
        columns=mine,
    )
