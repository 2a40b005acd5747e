"""The pool of ranks reports what goes wrong and recovers."""

import os
import time
from datetime import timedelta

import pytest

from parallel.rank_pool import RankFailure, RankPool


def rank_and_world_on_rank() -> tuple[int, int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.getpid()


def fail_on_rank(failing: int) -> None:
    if int(os.environ["RANK"]) == failing:
        raise ValueError("the reason")


def hang_on_rank(hanging: int) -> None:
    if int(os.environ["RANK"]) == hanging:
        time.sleep(60)


def die_on_rank(dying: int) -> None:
    if int(os.environ["RANK"]) == dying:
        os._exit(1)


def test_ranks_stay_the_same_processes_and_answer_in_order(pool: RankPool) -> None:
    first, second = pool.run(3, rank_and_world_on_rank), pool.run(2, rank_and_world_on_rank)
    assert [answer[:2] for answer in first] == [(0, 3), (1, 3), (2, 3)]
    assert [answer[:2] for answer in second] == [(0, 2), (1, 2)]
    assert [answer[2] for answer in second] == [answer[2] for answer in first[:2]]


def test_failures_are_named_and_the_pool_goes_on() -> None:
    with RankPool(2, timeout=timedelta(seconds=60)) as own:
        with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2: .*ValueError: the reason"):
            own.run(2, fail_on_rank, 1)
        with pytest.raises(RankFailure, match="rank 0 of 2: the process died"):
            own.run(2, die_on_rank, 0)
        assert [answer[:2] for answer in own.run(2, rank_and_world_on_rank)] == [(0, 2), (1, 2)]


def test_a_rank_that_hangs_is_named_after_the_timeout(pool: RankPool) -> None:
    pool.run(1, rank_and_world_on_rank)  # the server that processes are forked from is there from now on
    with RankPool(2, timeout=timedelta(seconds=5)) as own:
        with pytest.raises(RankFailure, match=r"ranks \[1\] of 2 gave no answer in 5"):
            own.run(2, hang_on_rank, 1)
        assert len(own.run(1, rank_and_world_on_rank)) == 1


def test_a_world_larger_than_the_pool_is_refused() -> None:
    with RankPool(2) as own, pytest.raises(AssertionError):
        own.run(3, rank_and_world_on_rank)
