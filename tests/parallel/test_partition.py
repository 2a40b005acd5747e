"""Pipeline stages: contiguous, none empty, as even as can be."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.partition import balanced_stages

COSTS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def cost_of_stages(costs: list[int], stages: list[int]) -> list[int]:
    return [sum(cost for cost, stage in zip(costs, stages, strict=True) if stage == s) for s in range(stages[-1] + 1)]


def best_by_trying_all(costs: list[int], num_stages: int) -> int:
    bounds = ((0, *cuts, len(costs)) for cuts in combinations(range(1, len(costs)), num_stages - 1))
    return min(max(sum(costs[a:b]) for a, b in pairwise(bound)) for bound in bounds)


@given(COSTS, st.integers(1, 8))
def test_the_largest_stage_is_as_small_as_possible(costs: list[int], num_stages: int) -> None:
    costly = sum(cost > 0 for cost in costs)
    if num_stages > costly:
        with pytest.raises(ValueError, match=f"{num_stages} stages for {costly} blocks"):
            balanced_stages(costs, num_stages)
        return
    stages = balanced_stages(costs, num_stages)
    assert stages == sorted(stages) and set(stages) == set(range(num_stages)), "contiguous, in order, none left out"
    found = cost_of_stages(costs, stages)
    assert min(found) > 0
    assert max(found) == best_by_trying_all(costs, num_stages)


def test_the_last_stage_of_a_small_model_has_parameters() -> None:
    """4 layers under a large vocabulary on 4 stages: embedding, layers, norm, head, loss."""
    assert balanced_stages([0, 9, 9, 9, 9, 0, 16, 0], 4) == [0, 0, 1, 2, 2, 3, 3, 3]


def test_the_final_norm_goes_with_the_head() -> None:
    assert balanced_stages([0, 5, 5, 0, 10, 0], 2) == [0, 0, 0, 1, 1, 1]
