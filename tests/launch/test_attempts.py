"""What follows an end of a job: a function of what is known about its starts."""

from pathlib import Path

import pytest

from launch.cluster.attempts import (
    LONGEST_PAUSE_SECONDS,
    Attempt,
    Begin,
    End,
    NodeEnd,
    attempt_folder,
    decide,
    read_attempts,
    write_begin,
    write_end,
    write_node_end,
)
from nanotron_recipes.schema.slurm import Slurm

SLURM = Slurm(max_requeues=3)
KILLED_ON_B = [
    NodeEnd("a", "crashed", "rank 0 lost its peers", 11.0, False),
    NodeEnd("b", "crashed", "rank 2 was ended by SIGKILL", 11.5, True),
]


def attempt(number: int, step: int, *nodes: NodeEnd, end: End | None = None) -> Attempt:
    return Attempt(Begin("7", number, ["a", "b"], f"2026-01-01T00:0{number}:00+00:00", step), list(nodes), end)


def failed(step: int) -> End:
    return End("requeue", "", step, "", True, 60, [])


def after(
    *attempts: Attempt,
    step: int,
    asked: str = "",
    is_done: bool = False,
    failure: str | None = None,
    is_cancelled: bool = False,
) -> End:
    return decide(
        attempts,
        step=step,
        is_done=is_done,
        failure=failure,
        asked=asked,
        slurm=SLURM,
        is_cancelled=is_cancelled,
    )


def test_a_run_that_is_done_is_done_whatever_srun_and_signals_said() -> None:
    end = after(attempt(0, 0, *KILLED_ON_B), step=40, asked="USR1", is_done=True)
    assert (end.verdict, end.is_failure) == ("done", False)


def test_a_stop_that_was_asked_for_is_no_failure_and_has_no_pause() -> None:
    end = after(attempt(0, 10), step=20, asked="USR1")
    assert (end.verdict, end.is_failure, end.pause_seconds) == ("requeue", False, 0)


def test_ranks_that_stopped_in_good_order_were_asked_by_slurm() -> None:
    """A preemption reaches the ranks and not the batch shell."""
    end = after(attempt(0, 10, *(NodeEnd(name, "ended", "", None, False) for name in "ab")), step=20)
    assert (end.verdict, end.is_failure, end.pause_seconds) == ("requeue", False, 0)


def test_a_cancelled_job_is_done_with_unless_it_would_fail_again() -> None:
    cancelled = decide(
        [attempt(0, 10)], step=20, is_done=False, failure=None, asked="TERM", slurm=SLURM, is_cancelled=True
    )
    assert (cancelled.verdict, cancelled.is_failure, cancelled.step) == ("cancelled", False, 20)
    mistaken = attempt(0, 10, NodeEnd("b", "mistake", "no such data", None, False))
    assert after(mistaken, step=20, asked="TERM", is_cancelled=True).verdict == "give up"


def test_time_limits_that_come_before_anything_is_saved_do_not_go_on_for_ever() -> None:
    history: list[Attempt] = []
    for number in range(4):
        end = after(*history, attempt(number, 5), step=5, asked="USR1")
        history.append(attempt(number, 5, end=end))
    assert [(entry.end.verdict, entry.end.pause_seconds) for entry in history if entry.end] == [
        *[("requeue", 0)] * 3,
        ("give up", 0),
    ]


@pytest.mark.parametrize("asked", ["", "USR1"])
def test_what_would_fail_again_is_not_started_again(asked: str) -> None:
    marked = after(attempt(0, 0, *KILLED_ON_B), step=5, asked=asked, failure="3 skipped steps in a row")
    mistaken = after(attempt(0, 0, NodeEnd("b", "mistake", "no such data", None, False)), step=0, asked=asked)
    assert (marked.verdict, mistaken.verdict) == ("give up", "give up")
    assert "3 skipped steps in a row" in marked.reason
    assert "b: no such data" in mistaken.reason


def test_a_rank_that_was_killed_is_where_a_failure_began_not_one_that_lost_its_peers() -> None:
    end = after(attempt(0, 0, *KILLED_ON_B), step=5)
    assert end.reason == "b: rank 2 was ended by SIGKILL"


def test_pauses_double_while_nothing_is_gained_and_the_limit_ends_it() -> None:
    history: list[Attempt] = []
    ends = []
    for number in range(4):
        ends.append(after(*history, attempt(number, 5), step=5))
        history.append(attempt(number, 5, end=ends[-1]))
    assert [end.pause_seconds for end in ends[:3]] == [60, 120, 240]
    assert [end.verdict for end in ends] == ["requeue"] * 3 + ["give up"]
    assert "4 failures in a row" in ends[3].reason


def test_a_new_checkpoint_starts_the_count_again() -> None:
    history = [attempt(number, 5, end=failed(5)) for number in range(3)]
    assert after(*history, attempt(3, 5), step=6).pause_seconds == 60
    assert after(*history, attempt(3, 6), step=6).pause_seconds == 60


def test_a_start_without_an_end_counts_and_a_planned_stop_ends_the_row() -> None:
    died = [attempt(0, 5), attempt(1, 5)]
    assert after(*died, attempt(2, 5), step=5).pause_seconds == 240
    stopped = attempt(2, 5, end=End("requeue", "", 5, "", False, 0, []))
    assert after(*died, stopped, attempt(3, 5), step=5).pause_seconds == 60


def test_the_longest_pause_is_half_an_hour() -> None:
    patient = Slurm(max_requeues=100)
    history = [attempt(number % 10, 5, end=failed(5)) for number in range(50)]
    end = decide([*history, attempt(9, 5)], step=5, is_done=False, failure=None, asked="", slurm=patient)
    assert end.pause_seconds == LONGEST_PAUSE_SECONDS


def test_a_node_where_failures_begin_twice_is_kept_off() -> None:
    first = attempt(0, 0, *KILLED_ON_B, end=failed(5))
    assert after(first, step=5).keep_off == []
    assert after(first, attempt(1, 5, *KILLED_ON_B), step=9).keep_off == ["b"]


def test_records_are_read_back_and_damaged_ones_count_as_absent(tmp_path: Path) -> None:
    begun = [Begin("7", 0, ["a"], "2026-01-01T00:00:00+00:00", 0), Begin("7", 1, ["a"], "2026-01-01T01:00:00+00:00", 5)]
    for begin in reversed(begun):
        write_begin(tmp_path, begin)
    write_node_end(tmp_path, "7", 0, KILLED_ON_B[1])
    write_end(tmp_path, "7", 0, failed(5))
    (attempt_folder(tmp_path, "7", 1) / "end.json").write_text('{"verdict": "done"')
    (attempt_folder(tmp_path, "7", 1) / "node-a.json").write_text("[]")
    assert read_attempts(tmp_path) == [
        Attempt(begun[0], [KILLED_ON_B[1]], failed(5)),
        Attempt(begun[1], [], None),
    ]
