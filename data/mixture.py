"""Which source the i-th sample of a data stage comes from, and how many each source gave before it: both in O(1).

Weights become whole numbers of samples (quotas) in a period of P samples; the quotas over P *are* the weights. Inside
a period the sources follow Tijdeman's order ("The chairman assignment problem", 1980): among the sources whose deficit
allows it, the one that would be late first comes next. Every prefix then holds of every source the exact share to
within 1 − 1/(2k − 2) < 1 sample (k sources).
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

MAX_PERIOD = 65536


def quotas_of(weights: Sequence[float], max_period: int = MAX_PERIOD) -> list[int]:
    """Whole numbers in the ratio of the weights; their sum is the period.

    Weights are read as the decimals they are written as and normalised by their sum. Where they fit a period of at
    most `max_period` they are met exactly by the smallest one (.25 .40 .35 gives 5, 8, 7); otherwise the period is
    `max_period` and the largest remainders are rounded up. A positive weight gets at least one sample a period.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(exact)
    assert total > 0 and min(exact) >= 0, "weights are not negative and not all zero"
    shares = [weight / total for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= max_period:
        return [int(share * period) for share in shares]
    return _largest_remainder(shares, max_period)


def _largest_remainder(shares: Sequence[Fraction], period: int) -> list[int]:
    quotas = [math.floor(share * period) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: quotas[i] - shares[i] * period)
    for i in by_remainder[: period - sum(quotas)]:
        quotas[i] += 1
    for i, share in enumerate(shares):
        if share > 0 and quotas[i] == 0:
            quotas[max(range(len(quotas)), key=quotas.__getitem__)] -= 1
            quotas[i] = 1
    return quotas


def tijdeman_order(quotas: Sequence[int]) -> npt.NDArray[np.int16]:
    """The sources of one period's samples, int16 [sum(quotas)], source i exactly quotas[i] times."""
    period = sum(quotas)
    present = [i for i, quota in enumerate(quotas) if quota > 0]
    if len(present) == 1:
        return np.full(period, present[0], dtype=np.int16)
    unit = 2 * len(present) - 2
    # The n-th sample of a source with share q/P may come at slot j (from 1) once j·q/P − n >= 1/unit, and is due at
    # (n + 1 − 1/unit)·P/q. All in integers: times `unit`, rounded up and down.
    releases: list[Int64Array] = []
    deadlines: list[Int64Array] = []
    owners: list[Int64Array] = []
    for i in present:
        n = np.arange(quotas[i], dtype=np.int64)
        releases.append(-(-((n * unit + 1) * period) // (quotas[i] * unit)))
        deadlines.append((n * unit + unit - 1) * period // (quotas[i] * unit))
        owners.append(np.full(quotas[i], i, dtype=np.int64))
    release = np.concatenate(releases)
    by_release = np.argsort(release, kind="stable")
    at = release[by_release].tolist()
    # One number for both, deadline first: a heap of numbers is twice as fast as one of pairs.
    coded = np.concatenate(deadlines) * len(quotas) + np.concatenate(owners)
    waiting = coded[by_release].tolist()
    chosen: list[int] = []
    ready: list[int] = []
    released = 0
    for slot in range(1, period + 1):
        while released < period and at[released] <= slot:
            heapq.heappush(ready, waiting[released])
            released += 1
        chosen.append(heapq.heappop(ready))
    return (np.array(chosen, dtype=np.int64) % len(quotas)).astype(np.int16)


@dataclass(frozen=True)
class Mixture:
    """The endless sequence of sources of one data stage."""

    quotas: tuple[int, ...]
    """Samples of each source in a period."""
    order: npt.NDArray[np.int16]
    """The source of each slot of a period."""
    ranks: npt.NDArray[np.int32]
    """How many earlier slots of the period have the same source."""

    @classmethod
    def from_weights(cls, weights: Sequence[float], max_period: int = MAX_PERIOD) -> "Mixture":
        """The mixture with these weights, which need not sum to 1."""
        quotas = quotas_of(weights, max_period)
        order = tijdeman_order(quotas)
        ranks = np.empty(len(order), dtype=np.int32)
        for i in range(len(quotas)):
            mine = order == i
            ranks[mine] = np.arange(int(mine.sum()), dtype=np.int32)
        return cls(tuple(quotas), order, ranks)

    @property
    def period(self) -> int:
        """Samples after which the sequence of sources repeats."""
        return len(self.order)

    def at(self, indices: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Of samples `indices` (int64, from 0 at the stage's start): source, and how many of it came before."""
        periods, slots = np.divmod(indices, self.period)
        sources = self.order[slots].astype(np.int64)
        before = periods * np.array(self.quotas, dtype=np.int64)[sources] + self.ranks[slots]
        return sources, before

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first `num_samples` samples each source gave."""
        periods, slots = divmod(num_samples, self.period)
        rest = np.bincount(self.order[:slots], minlength=len(self.quotas))
        return [periods * quota + int(extra) for quota, extra in zip(self.quotas, rest, strict=True)]
