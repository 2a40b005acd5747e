from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.mixture import MAX_PERIOD, Mixture, quotas_of, tijdeman_order

WEIGHTS = st.lists(st.floats(0.0005, 1.0), min_size=1, max_size=9)
TINY_STAGES = [(0.5, 0.25, 0.25), (0.25, 0.40, 0.35), (0.15, 0.15, 0.70)]


@pytest.mark.parametrize("weights", TINY_STAGES)
def test_short_decimal_weights_are_met_exactly(weights: tuple[float, ...]) -> None:
    quotas = quotas_of(weights)
    assert [Fraction(quota, sum(quotas)) for quota in quotas] == [Fraction(str(weight)) for weight in weights]
    assert sum(quotas) <= 20


@pytest.mark.parametrize("weights", TINY_STAGES)
def test_every_prefix_of_a_short_run_is_within_one_sample(weights: tuple[float, ...]) -> None:
    sources, _ = Mixture.from_weights(weights).at(np.arange(13_200, dtype=np.int64))
    counts = np.cumsum(np.eye(len(weights))[sources], axis=0)
    exact = np.arange(1, 13_201)[:, None] * np.array(weights)
    assert np.abs(counts - exact).max() < 1


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, period=st.sampled_from([500, 3001]))
def test_tijdemans_bound_holds_for_every_prefix(weights: list[float], period: int) -> None:
    quotas = np.array(quotas_of(weights, period))
    total, k = int(quotas.sum()), len(weights)
    order = tijdeman_order(quotas.tolist())
    assert np.bincount(order, minlength=k).tolist() == quotas.tolist()
    error = np.abs(np.cumsum(np.eye(k)[order], axis=0) - np.arange(1, total + 1)[:, None] * quotas / total).max()
    assert error <= (1 - 1 / (2 * k - 2) if k > 1 else 0) + 1e-9


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS)
def test_large_remainders_keep_the_weights_to_a_sample_in_a_period(weights: list[float]) -> None:
    quotas = quotas_of(weights, 4096)
    shares = np.array(weights) / sum(weights)
    assert min(quotas) >= 1 and np.abs(np.array(quotas) - shares * sum(quotas)).max() < len(weights)


def test_unsummed_weights_are_normalised_and_zero_gives_nothing() -> None:
    assert quotas_of([2.0, 1.0, 0.0]) == [2, 1, 0]
    assert sum(quotas_of([0.3331, 0.67215, 0.0003713])) == MAX_PERIOD
    assert set(Mixture.from_weights([0.0, 1.0]).at(np.arange(9))[0].tolist()) == {1}


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, first=st.integers(0, 10**12))
def test_ranks_count_on_and_counts_agree_with_them_anywhere(weights: list[float], first: int) -> None:
    mixture = Mixture.from_weights(weights, 997)
    sources, before = mixture.at(np.arange(first, first + 300, dtype=np.int64))
    at_first, at_last = mixture.counts(first), mixture.counts(first + 300)
    for i in range(len(weights)):
        assert before[sources == i].tolist() == list(range(at_first[i], at_last[i]))
