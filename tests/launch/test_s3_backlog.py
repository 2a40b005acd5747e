"""Which steps wait for an upload, which are given up, and what a local disk may lose meanwhile."""

import threading
import time
from pathlib import Path

import pytest
from checkpoint_store import BUCKET, CheckpointStore
from hypothesis import given
from hypothesis import strategies as st
from uploaded_run import begun_run, make_checkpoint, uploaded, uploading, wait_for

from data.transfer import Stopped, Watch
from launch.storage.backlog import beyond_backlog, waiting_of
from launch.storage.throttle import Throttle
from launch.storage.uploader import Uploader
from launch.train.retention import Uploading, prunable_steps, reasons_to_keep
from nanotron_recipes.schema.checkpoints import Checkpoints, S3Upload

STEPS = st.lists(st.integers(1, 400), unique=True).map(sorted)


@given(STEPS, st.sets(st.integers(1, 400)), st.integers(1, 5), st.booleans())
def test_of_what_waits_the_oldest_are_given_up_never_the_newest_and_never_what_is_being_sent(
    steps: list[int], done: set[int], limit: int, is_sending: bool
) -> None:
    here, finished = [(step, "a") for step in steps], [(step, "a") for step in done]
    waiting = [step for step, _ in waiting_of(here, finished)]
    assert waiting == [step for step in steps if step not in done]
    sending = waiting[0] if is_sending and waiting else None
    given_up = [one.step for one in beyond_backlog(here, finished, sending, limit)]
    older = [step for step in waiting if step != steps[-1]]
    left = [step for step in older if step not in given_up]
    assert len(left) == min(limit, len(older)), "no more than must be, and no fewer"
    assert set(given_up) <= set(older) - {sending}
    assert all(old < young for old in given_up for young in left if young != sending)


@given(st.integers(1, 4), st.integers(1, 4), st.booleans(), st.data())
def test_however_the_uploads_go_a_disk_never_holds_more_than_keep_last_the_one_that_is_saved_and_the_backlog(
    keep_last: int, limit: int, keeps_one: bool, data: st.DataObject
) -> None:
    policy = Checkpoints(keep_last=keep_last)
    disk: list[int] = []
    done: set[tuple[int, str]] = set()
    sending: int | None = None
    for step in range(1, 30):
        disk.append(step)
        assert len(disk) <= keep_last + 1 + limit
        here = [(one, "a") for one in disk]
        done |= {(one.step, one.identity) for one in beyond_backlog(here, done, sending, limit)}
        for old in prunable_steps(disk, (), policy, Uploading(keeps_one, {one for one, _ in done})):
            disk.remove(old)
        waiting = [one for one, _ in waiting_of([(one, "a") for one in disk], done)]
        done |= {(one, "a") for one in data.draw(st.sets(st.sampled_from(waiting)) if waiting else st.just(set()))}
        waiting = [one for one in waiting if (one, "a") not in done]
        sending = data.draw(st.sampled_from([None, *waiting]))


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


@pytest.mark.parametrize("rate", [None, 50.0])
def test_what_an_uploader_sends_passes_at_the_recipes_rate(
    rate: float | None, store: CheckpointStore, small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[tuple[float, int]] = []

    class Seen(Throttle):
        def take(self, count: int, watch: Watch) -> None:
            passed.append((self._rate, count))
            super().take(count, watch)

    monkeypatch.setattr("launch.storage.uploader.Throttle", Seen)
    upload = S3Upload(upload_s3_path=f"s3://{BUCKET}/team", endpoint_url=store.url, max_megabytes_per_second=rate)
    folder, recipe = begun_run(tmp_path, small_file, upload)
    make_checkpoint(folder.checkpoints, 8)
    with uploading(Uploader(folder, recipe, "a", ("a",), "l1")):
        wait_for(lambda: uploaded(folder) == [8])
    sizes = [file.stat().st_size for file in (folder.checkpoints / "8").iterdir() if file.name != "manifest.json"]
    assert sorted(passed) == [(rate * 1e6, size) for size in sorted(sizes) if rate is not None]
