import threading
import time

import pytest

from data.batch import StepBatch
from data.loader import Prefetcher


def batch(step: int, slot: int = 0) -> StepBatch:
    return StepBatch([], step, "stage", [])


def prefetch_threads() -> int:
    return sum(thread.name == "data-prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_come_in_order_from_the_first_step_to_the_last(workers: int) -> None:
    with Prefetcher(batch, 7, 30, workers) as loader:
        assert [item.num_valid_targets for item in loader] == list(range(7, 31))
        assert next(loader, None) is None


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_what_making_a_batch_raises_reaches_the_reader_at_that_step(workers: int) -> None:
    def fails_at_four(step: int, slot: int) -> StepBatch:
        if step == 4:
            raise OSError("shard is gone")
        return batch(step)

    with Prefetcher(fails_at_four, 1, 10, workers) as loader:
        assert [next(loader).num_valid_targets for _ in range(3)] == [1, 2, 3]
        with pytest.raises(OSError, match="shard is gone"):
            next(loader)
        assert next(loader, None) is None


def test_it_reads_no_further_ahead_than_its_depth() -> None:
    made: list[int] = []

    def noted(step: int, slot: int) -> StepBatch:
        made.append(step)
        return batch(step)

    with Prefetcher(noted, 1, 100, workers=1, depth=3) as loader:
        next(loader)
        deadline = time.monotonic() + 5
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert made == [1, 2, 3, 4], "one taken, three waiting"


@pytest.mark.parametrize("workers", [1, 3, 6])
def test_a_batch_that_was_given_out_keeps_its_slot_until_the_next_is_asked_for(workers: int) -> None:
    in_slot: dict[int, int] = {}

    def noted(step: int, slot: int) -> StepBatch:
        in_slot[slot] = step
        return batch(step)

    with Prefetcher(noted, 1, 60, workers, depth=3) as loader:
        for given in loader:
            time.sleep(0.002)
            assert given.num_valid_targets in in_slot.values()
    assert len(in_slot) == max(workers, 3) + 1


def test_without_workers_nothing_is_read_ahead() -> None:
    made: list[int] = []

    def noted(step: int, slot: int) -> StepBatch:
        made.append(step)
        return batch(step, slot)

    before = prefetch_threads()
    with Prefetcher(noted, 1, 9, workers=0) as loader:
        next(loader)
        assert made == [1] and prefetch_threads() == before


def test_closing_early_ends_the_thread() -> None:
    before = prefetch_threads()
    loader = Prefetcher(batch, 1, 10**9)
    next(loader)
    assert prefetch_threads() == before + 1
    loader.close()
    assert prefetch_threads() == before and next(loader, None) is None


def test_threads_end_with_the_last_step() -> None:
    before = prefetch_threads()
    loader = Prefetcher(batch, 1, 5, workers=3)
    assert len(list(loader)) == 5
    deadline = time.monotonic() + 5
    while prefetch_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert prefetch_threads() == before
