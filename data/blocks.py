"""The order of a source's blocks: which block of its text is the i-th to be read, in O(1), at any sequence length.

A block is a fixed number of tokens. Where all sequences of a run are one block long, an epoch is one keyed permutation
of them. A run whose later stages have longer sequences reads them as runs of neighbouring blocks, and yet no block
twice or not at all when the length changes. For that, a fixed number of neighbouring blocks (a *stretch*, as long as
the longest sequence) stays together: the stretches of an epoch are permuted, so many of them at a time are *open*, and
the blocks of the open ones are permuted among themselves. A change of length lies inside the open ones of a source:
those go on block by block to their end; from then on runs of blocks are permuted instead of blocks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from data.order import Permutation, derive_key

Int64Array = npt.NDArray[np.int64]

OPEN_BLOCKS = 32768
"""Blocks in the stretches that are open at a time: many, so that the neighbours in a stretch are read far apart; few,
because so many are read as single blocks after a change of the sequence length."""


@dataclass(frozen=True)
class Reading:
    """From a position in a source on it is read for sequences of so many blocks."""

    first: int
    """Blocks of the source that were read before, counted over all epochs."""
    blocks: int
    """Blocks of a sequence."""


class BlockOrder:
    """Where the blocks of a source are read, position by position over all epochs; every epoch has its own order."""

    def __init__(
        self, num_blocks: int, seed: int, fingerprint: str, stretch: int = 1, readings: tuple[Reading, ...] = ()
    ) -> None:
        """An order of range(num_blocks) that follows from `seed` and what the source holds (`fingerprint`).

        `stretch` is the number of blocks that stay together, 1 where no sequence is longer than a block; `readings`
        are the lengths that the source is read at, in the order of their positions.
        """
        self.num_blocks = num_blocks
        self._stretch = stretch
        self._readings = readings
        self._num_stretches = num_blocks // stretch
        self._open_stretches = max(1, OPEN_BLOCKS // stretch)
        self._key: tuple[int, str] = (seed, fingerprint)
        self._permutation: Callable[..., Permutation] = lru_cache(maxsize=8)(self._make_permutation)

    def blocks(self, positions: Int64Array) -> Int64Array:
        """The block (int64, below num_blocks) that is read at each of `positions` (int64 of any shape)."""
        epochs, places = np.divmod(positions, self.num_blocks)
        found = np.empty_like(positions)
        for epoch in _distinct(epochs):
            mine = epochs == epoch
            found[mine] = self._in_epoch(epoch, places[mine])
        return found

    def _in_epoch(self, epoch: int, places: Int64Array) -> Int64Array:
        if self._stretch == 1:
            return self._permutation(self.num_blocks, "windows", epoch).of(places)
        size = self._open_stretches * self._stretch
        last = max(0, -(-self._num_stretches // self._open_stretches) - 1)
        windows = np.minimum(places // size, last)
        found = np.empty_like(places)
        for window in _distinct(windows):
            mine = windows == window
            length = size if window < last else self.num_blocks - last * size
            inside = self._in_window(epoch, window, length, places[mine] - window * size)
            found[mine] = self._blocks_of(epoch, window, inside)
        return found

    def _in_window(self, epoch: int, window: int, length: int, places: Int64Array) -> Int64Array:
        """Places among the `length` blocks of the open stretches, permuted in runs as long as the sequences allow."""
        start = epoch * self.num_blocks + window * self._open_stretches * self._stretch
        reading = next((r for r in reversed(self._readings) if r.first <= start), Reading(0, 1))
        run = math.gcd(reading.blocks, self._stretch)
        whole = length // run * run
        if not whole:
            return places
        # Sequences begin at `first` plus a multiple of their length, not at the window's beginning: turned by so much,
        # only the sequence that crosses the border between two windows is in two pieces.
        turned = (places - (reading.first - start) % run) % whole
        runs, offsets = np.divmod(turned, run)
        permuted = self._permutation(whole // run, "runs", epoch, window).of(runs) * run + offsets
        return np.where(places < whole, permuted, places)

    def _blocks_of(self, epoch: int, window: int, places: Int64Array) -> Int64Array:
        """Blocks of the source: the stretches are permuted; a rest shorter than one comes with the last of them."""
        stretches, offsets = np.divmod(places, self._stretch)
        stretches += window * self._open_stretches
        whole = stretches < self._num_stretches
        if self._num_stretches:
            permuted = self._permutation(self._num_stretches, "stretches", epoch).of(stretches[whole])
            stretches[whole] = permuted
        return stretches * self._stretch + offsets

    def _make_permutation(self, size: int, purpose: str, *place: int) -> Permutation:
        seed, fingerprint = self._key
        return Permutation(size, derive_key(seed, purpose, fingerprint, *place))


def _distinct(values: Int64Array) -> list[int]:
    """The few different values of an array that is seldom large, in rising order."""
    return sorted(set(values.ravel().tolist()))
