"""Which steps wait for an upload, which are given up, and what a local disk may lose meanwhile."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.transfer import Stopped, Watch
from launch.storage.backlog import Backlog
from launch.storage.throttle import Throttle
from launch.train.retention import Uploading, prunable_steps, reasons_to_keep
from nanotron_recipes.schema.checkpoints import Checkpoints

STEPS = st.lists(st.integers(1, 400), unique=True).map(sorted)


@given(STEPS, st.sets(st.integers(1, 400)), st.integers(1, 5), st.booleans())
def test_of_what_waits_the_oldest_are_given_up_never_the_newest_and_never_what_is_being_sent(
    steps: list[int], done: set[int], limit: int, is_sending: bool
) -> None:
    backlog = Backlog(limit, [(step, "a") for step in steps], [(step, "a") for step in done])
    waiting = [step for step, _ in backlog.waiting()]
    assert waiting == [step for step in steps if step not in done]
    sending = (waiting[0], "a") if is_sending and waiting else None
    given_up = [one.step for one in backlog.excess(sending)]
    left = [step for step in waiting if step not in given_up and (step, "a") != sending]
    assert len(left) <= limit
    assert len(left) == min(limit, len(waiting) - (sending is not None)), "no more than must be"
    assert not steps or steps[-1] not in given_up
    assert sending is None or sending[0] not in given_up
    assert all(old < young for old in given_up for young in left)


@given(STEPS, st.sets(st.integers(1, 400)), st.sets(st.integers(1, 400)), st.integers(1, 4), st.booleans())
def test_a_local_disk_loses_neither_the_newest_nor_what_the_store_has_not_and_all_else_beyond_keep_last(
    steps: list[int], damaged: set[int], done: set[int], keep_last: int, keeps_one: bool
) -> None:
    policy = Checkpoints(keep_last=keep_last, keep_every=2)
    uploading = Uploading(keeps_one, done)
    good = [step for step in steps if step not in damaged]
    deleted = set(prunable_steps(steps, damaged, policy, uploading))
    assert not good or good[-1] not in deleted
    assert deleted.isdisjoint(step for step in good if step not in done)
    last = good[-1:] if keeps_one else good[-keep_last:]
    assert deleted & set(good) == {step for step in good if step in done and step not in last}
    assert set(reasons_to_keep(good, policy, uploading)) == set(good) - deleted
    if not keeps_one:
        assert prunable_steps(steps, damaged, Checkpoints(), uploading) == [], "keep_last null keeps all"


def test_however_many_send_no_more_bytes_pass_than_were_allowed_and_a_stop_is_heard() -> None:
    throttle, watch = Throttle(1e6), Watch()
    began = time.monotonic()
    threads = [threading.Thread(target=lambda: [throttle.take(20_000, watch) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began >= (4 * 5 - 1) * 0.02, "the first one need not wait"
    throttle.take(100_000_000, watch)
    threading.Timer(0.05, watch.stop.set).start()
    with pytest.raises(Stopped):
        throttle.take(1, watch)
