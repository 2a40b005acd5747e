import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import ROUNDS, Permutation, derive_key

KEYS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize("size", [*range(1, 130), 1000, 4096, 4097, 65537])
def test_every_value_appears_exactly_once(size: int) -> None:
    values = Permutation(size, derive_key("size", size)).of(np.arange(size, dtype=np.int64))
    assert np.array_equal(np.sort(values), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 3000), key=KEYS)
def test_any_size_and_key_give_a_bijection(size: int, key: int) -> None:
    values = Permutation(size, key).of(np.arange(size, dtype=np.int64))
    assert np.array_equal(np.sort(values), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 2**50), key=KEYS, start=st.integers(0, 2**50))
def test_the_scalar_and_the_vectorised_form_agree(size: int, key: int, start: int) -> None:
    permutation = Permutation(size, key)
    indices = np.array([(start + i) % size for i in range(100)], dtype=np.int64)
    assert permutation.of(indices).tolist() == [permutation.at(i) for i in indices.tolist()]


def test_the_order_never_changes_between_versions() -> None:
    permutation = Permutation(1_000_003, derive_key(42, "windows", "prose", 0))
    assert [permutation.at(i) for i in range(6)] == [25503, 128645, 238246, 570438, 800750, 264369]


def test_neighbours_are_not_correlated() -> None:
    size = 100_003
    values = Permutation(size, derive_key(1)).of(np.arange(size, dtype=np.int64))
    correlation = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(size) and ROUNDS == 6


def test_keys_differ_with_every_part_and_with_their_order() -> None:
    keys = {
        derive_key(*parts)
        for parts in [(1, 2), (2, 1), (1, 2, 0), (1,), ("1", 2), (1, "2"), ("a", "b"), ("b", "a"), ("ab",), ()]
    }
    assert len(keys) == 10


def test_two_keys_give_unrelated_orders() -> None:
    size = 50_000
    first, second = (Permutation(size, derive_key(key)).of(np.arange(size, dtype=np.int64)) for key in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(size)
