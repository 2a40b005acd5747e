import threading
import time

import pytest

from data.batch import StepBatch
from data.loader import Prefetcher


def batch(step: int) -> StepBatch:
    return StepBatch([], step, "stage", [])


def prefetch_threads() -> int:
    return sum(thread.name == "data-prefetch" for thread in threading.enumerate())


def test_batches_come_in_order_from_the_first_step_to_the_last() -> None:
    with Prefetcher(batch, 7, 30) as loader:
        assert [item.num_valid_targets for item in loader] == list(range(7, 31))
        assert next(loader, None) is None


def test_what_making_a_batch_raises_reaches_the_reader_at_that_step() -> None:
    def fails_at_four(step: int) -> StepBatch:
        if step == 4:
            raise OSError("shard is gone")
        return batch(step)

    with Prefetcher(fails_at_four, 1, 10) as loader:
        assert [next(loader).num_valid_targets for _ in range(3)] == [1, 2, 3]
        with pytest.raises(OSError, match="shard is gone"):
            next(loader)
        assert next(loader, None) is None


def test_it_reads_no_further_ahead_than_its_depth() -> None:
    made: list[int] = []

    def noted(step: int) -> StepBatch:
        made.append(step)
        return batch(step)

    with Prefetcher(noted, 1, 100, depth=3) as loader:
        next(loader)
        deadline = time.monotonic() + 5
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert made == [1, 2, 3, 4, 5], "one taken, three waiting, one in hand"


def test_closing_early_ends_the_thread() -> None:
    before = prefetch_threads()
    loader = Prefetcher(batch, 1, 10**9)
    next(loader)
    assert prefetch_threads() == before + 1
    loader.close()
    assert prefetch_threads() == before and next(loader, None) is None
