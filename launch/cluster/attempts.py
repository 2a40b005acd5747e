"""The starts of a run's jobs and how each ended, and what follows from that: one small file for each thing that is
known, since several nodes write and some of them die.

    runs/<name>/attempts/<job>.<restart>/begin.json        the batch shell, before anything
                                         node-<name>.json  each node, when its ranks have ended
                                         end.json          the batch shell, with what it decided
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from nanotron_recipes.files import write_atomic
from nanotron_recipes.schema.slurm import Slurm

FOLDER = "attempts"
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 60, 1800
REPEATED = 2
"""Failures that began on one node, after which it is kept off."""

NodeOutcome = Literal["ended", "mistake", "crashed"]
Verdict = Literal["done", "requeue", "give up", "cancelled"]


@dataclass(frozen=True)
class Begin:
    """A start of a job: where, when (UTC), and after which step."""

    job: str
    restart: int
    nodes: list[str]
    time: str
    step: int


@dataclass(frozen=True)
class NodeEnd:
    """How a node's ranks ended; `failed_at` (seconds since the epoch) is when its first rank failed, if one did, and
    `is_by_signal` whether something killed it, and not itself."""

    node: str
    outcome: NodeOutcome
    message: str
    failed_at: float | None
    is_by_signal: bool


@dataclass(frozen=True)
class End:
    """What was decided after an attempt, and why."""

    verdict: Verdict
    reason: str
    step: int
    time: str
    is_failure: bool
    pause_seconds: int
    keep_off: list[str]


Record = TypeVar("Record", Begin, NodeEnd, End)


@dataclass(frozen=True)
class Attempt:
    """One start, as far as it is known; `end` is None while it runs, and where its batch shell died with its node or
    was killed by Slurm (which starts the job again by itself, unless somebody has cancelled it)."""

    begin: Begin
    nodes: list[NodeEnd]
    end: End | None

    def first_to_fail(self) -> NodeEnd | None:
        """The node where it began: where a rank was killed rather than lost its peers, and then the earliest."""
        failed = [node for node in self.nodes if node.failed_at is not None]
        return min(failed, key=lambda node: (not node.is_by_signal, node.failed_at), default=None)


def now() -> str:
    """The time, for the records."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def attempt_folder(run: Path, job: str, restart: int) -> Path:
    """Where an attempt's records lie."""
    return run / FOLDER / f"{job}.{restart}"


def write_begin(run: Path, begin: Begin) -> None:
    """Note a start."""
    _write(attempt_folder(run, begin.job, begin.restart) / "begin.json", begin)


def write_node_end(run: Path, job: str, restart: int, end: NodeEnd) -> None:
    """Note how a node's ranks ended."""
    _write(attempt_folder(run, job, restart) / f"node-{end.node}.json", end)


def write_end(run: Path, job: str, restart: int, end: End) -> None:
    """Note what was decided."""
    _write(attempt_folder(run, job, restart) / "end.json", end)


def read_attempts(run: Path) -> list[Attempt]:
    """All starts of a run's jobs, the oldest first. Records that cannot be read count as absent."""
    found = []
    for folder in (run / FOLDER).glob("*.*"):
        begin = _read(folder / "begin.json", Begin)
        if begin is not None:
            nodes = [_read(file, NodeEnd) for file in sorted(folder.glob("node-*.json"))]
            known = [node for node in nodes if node is not None]
            found.append(Attempt(begin, known, _read(folder / "end.json", End)))
    return sorted(found, key=lambda attempt: (attempt.begin.time, attempt.begin.restart))


def cancelled(step: int) -> End:
    """The end of a job that somebody has cancelled."""
    return _end("cancelled", f"somebody cancelled the job (scancel); saved after step {step}", step)


def decide(
    attempts: Sequence[Attempt],
    *,
    step: int,
    is_done: bool,
    failure: str | None,
    asked: str,
    slurm: Slurm,
    is_cancelled: bool = False,
) -> End:
    """What follows the last of `attempts`, which has just ended.

    Args:
        step: the newest step with a sound checkpoint.
        is_done: whether the run has nothing left to do.
        failure: why starting it again would be in vain, where the run says so.
        asked: the signal that asked it to stop; empty without one.
        is_cancelled: whether somebody has cancelled the job.
    """
    last = attempts[-1]
    if is_done:
        return _end("done", "nothing is left to do", step)
    mistake = next((node for node in last.nodes if node.outcome == "mistake"), None)
    if failure is not None or mistake is not None:
        said = failure if failure is not None else f"{mistake.node}: {mistake.message}" if mistake else ""
        return _end("give up", f"it would fail again: {said}", step, is_failure=True)
    if is_cancelled:
        return cancelled(step)
    if not asked and last.nodes and all(node.outcome == "ended" for node in last.nodes):
        asked = "SIGTERM"  # Slurm asks the ranks, not the batch shell, where it wants a job's nodes for another
    is_gain = step > last.begin.step
    if asked and is_gain:
        return _end("requeue", f"asked to stop ({asked}); saved after step {step}", step)
    failures = 1 if is_gain else 1 + failures_in_a_row(attempts[:-1], last.begin.step)
    reason = f"asked to stop ({asked}) before a step was saved" if asked else _what_failed(last)
    if failures > slurm.max_requeues:
        reason = f"{reason}; {failures} failures in a row without a new checkpoint (slurm.max_requeues)"
        return _end("give up", reason, step, is_failure=True)
    if asked:
        return _end("requeue", reason, step, is_failure=True)
    pause = min(FIRST_PAUSE_SECONDS * 2 ** (failures - 1), LONGEST_PAUSE_SECONDS)
    return _end("requeue", reason, step, is_failure=True, pause_seconds=pause, keep_off=bad_nodes(attempts))


def failures_in_a_row(attempts: Sequence[Attempt], step: int) -> int:
    """The failures that end `attempts` and began after step `step`: nothing was gained since. An attempt without an end
    is one: its node died, or Slurm took its nodes away."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.begin.step < step or (attempt.end is not None and not attempt.end.is_failure):
            break
        count += 1
    return count


def bad_nodes(attempts: Sequence[Attempt]) -> list[str]:
    """Nodes where failures began repeatedly."""
    firsts = [attempt.first_to_fail() for attempt in attempts]
    times = Counter(first.node for first in firsts if first is not None)
    return sorted(node for node, count in times.items() if count >= REPEATED)


def _what_failed(attempt: Attempt) -> str:
    first = attempt.first_to_fail()
    return f"{first.node}: {first.message}" if first is not None else "no node says why its ranks ended"


def _end(
    verdict: Verdict,
    reason: str,
    step: int,
    *,
    is_failure: bool = False,
    pause_seconds: int = 0,
    keep_off: list[str] | None = None,
) -> End:
    return End(verdict, reason, step, now(), is_failure, pause_seconds, keep_off or [])


def _write(path: Path, record: Any) -> None:
    write_atomic(path, json.dumps(asdict(record)) + "\n")


def _read(path: Path, kind: type[Record]) -> Record | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return kind(**{field.name: content[field.name] for field in fields(kind)})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
