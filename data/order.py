"""A keyed permutation of range(n) that needs no table: where sample i of an epoch lies is computed, not stored.

A generalised Feistel network: a number below n is written as a pair (left, right) with n <= rows · columns, and six
rounds alternately add a keyed hash of one half to the other. Every round can be undone, so the whole is a bijection of
range(rows · columns); the few values at or above n are sent through again until they fall below n ("cycle walking").
The scalar and the vectorised form agree bit for bit on every platform: 64-bit integers only.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

ROUNDS = 6
"""Two rounds show a correlation between neighbours; from four on none was measurable."""
SCALAR_BELOW = 24
"""Up to about this many values plain Python is faster than numpy's call overhead."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def mix64(value: int) -> int:
    """The output function of splitmix64 (Steele, Lea, Flood 2014): a bijection of the 64-bit integers."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from numbers and names; any change of a part, or of their order, gives an unrelated key."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)
    return int.from_bytes(hashlib.sha256(repr(plain).encode()).digest()[:8], "little")


def derive_keys(*parts: int | str, last: Iterable[int]) -> list[int]:
    """derive_key(*parts, number) of each number, in less time."""
    common = hashlib.sha256(repr(tuple(parts)).removesuffix(")").removesuffix(",").encode())
    keys = []
    for number in last:
        whole = common.copy()
        whole.update(f", {number})".encode())
        keys.append(int.from_bytes(whole.digest()[:8], "little"))
    return keys


def _mix64_array(values: UInt64Array) -> UInt64Array:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MIX_2)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Permutation:
    """A bijection of range(size), chosen by `key`; O(1) memory and time a value."""

    size: int
    """How many values are permuted, at least 1."""
    key: int
    """64-bit key, see derive_key."""
    rows: int = field(init=False)
    columns: int = field(init=False)
    round_keys: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        assert 1 <= self.size < 1 << 62, "the size of a permutation lies in 1 … 2^62"
        rows = math.isqrt(self.size - 1) + 1
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "columns", -(-self.size // rows))
        keys = tuple(mix64(self.key + (i + 1) * _GOLDEN) for i in range(ROUNDS))
        object.__setattr__(self, "round_keys", keys)

    def at(self, index: int) -> int:
        """Where `index` goes; 0 <= index < size."""
        value = index
        while True:
            left, right = divmod(value, self.columns)
            for i, key in enumerate(self.round_keys):
                if i % 2 == 0:
                    left = (left + mix64(right ^ key) % self.rows) % self.rows
                else:
                    right = (right + mix64(left ^ key) % self.columns) % self.columns
            value = left * self.columns + right
            if value < self.size:
                return value

    def of(self, indices: Int64Array) -> Int64Array:
        """Where each of `indices` (int64, any shape) goes; the same values as `at`."""
        if indices.size <= SCALAR_BELOW:
            flat = [self.at(int(i)) for i in indices.ravel()]
            return np.array(flat, dtype=np.int64).reshape(indices.shape)
        keys = [np.uint64(key) for key in self.round_keys]
        values = self._once(indices.astype(np.uint64), keys)
        while (outside := values >= np.uint64(self.size)).any():
            values[outside] = self._once(values[outside], keys)
        return values.astype(np.int64)

    def _once(self, values: UInt64Array, keys: Sequence[np.uint64 | UInt64Array]) -> UInt64Array:
        rows, columns = np.uint64(self.rows), np.uint64(self.columns)
        left, right = np.divmod(values, columns)
        for i, key in enumerate(keys):
            if i % 2 == 0:
                left = (left + _mix64_array(right ^ key) % rows) % rows
            else:
                right = (right + _mix64_array(left ^ key) % columns) % columns
        return left * columns + right


def permutations(size: int, keys: Sequence[int]) -> Int64Array:
    """Whole permutations of range(size), one a row, int64 [len(keys), size]: row i is that of Permutation(size,
    keys[i])."""
    first = Permutation(size, 0)
    base = np.array(keys, dtype=np.uint64)[:, None]
    rounds = [_mix64_array(base + np.uint64(((i + 1) * _GOLDEN) & _MASK)) for i in range(ROUNDS)]
    found = first._once(np.arange(size, dtype=np.uint64)[None, :], rounds)
    while (outside := found >= np.uint64(size)).any():
        rows = np.nonzero(outside)[0]
        found[outside] = first._once(found[outside], [key[rows, 0] for key in rounds])
    return found.astype(np.int64)
