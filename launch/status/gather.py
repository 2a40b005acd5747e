"""How a run is, gathered from the files in its folder. Reads in a moment, writes nothing, imports no torch."""

import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar

from launch.cluster.attempts import Attempt, read_attempts
from launch.status.checkpoint import CheckpointStatus, newest_checkpoint
from launch.status.nodes import NodeStatus, nodes_of
from launch.status.rank_report import read_reports
from launch.status.records import Records, read_records
from launch.status.runs import FoundRun
from launch.status.speed import (
    RECENT_STEPS,
    Drop,
    SlowRanks,
    find_drop,
    recent_mfu,
    recent_speed,
    seconds_left,
    slow_ranks,
    usual_speed,
)
from launch.status.uploads import UploadStatus, upload_status
from launch.train.holder import Holder
from launch.train.metrics import Event, Metrics, StepRecord
from launch.train.run_lock import holder_of
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import stage_sequence_length

QUIET_STEPS, QUIET_SECONDS = 10, 120.0
"""A run that trains and has recorded nothing for so many of its steps, and for so long, is called quiet."""

NO_WORD = "no word of its end: it was killed, or lost with its machine"

State = Literal["training", "queued", "begun", "stopped", "failed", "complete", "unknown"]
"""`begun`: a Slurm job has, and neither trains nor has said how it ended. `unknown`: the file that says who trains the
run, or that it is complete, is damaged."""

T = TypeVar("T")


@dataclass(frozen=True)
class RestartStatus:
    """A start of the run's ranks, and how it ended; empty where that is not known."""

    start: str
    """The Slurm job and its restart (`41.2`); of a start without Slurm its number, in the order of the records."""
    time: str
    """UTC."""
    nodes: list[str]
    """Empty without Slurm."""
    after_step: int
    verdict: str
    reason: str


@dataclass(frozen=True)
class RunStatus:
    """How a run is. None, or empty, where the run's files do not say."""

    run: str
    path: str
    recipe: str
    """The file: its own, or, before it has begun, that of its newest submission."""
    state: State
    message: str
    """Why it failed, or who trains it."""
    damage: list[str]
    """Of the files that say what the run is doing and has done, those that cannot be read, and why: what they would say
    is left out."""
    job: str
    """The newest Slurm job that was submitted for it."""
    job_nodes: int
    """How many nodes that was submitted for; 0 without Slurm."""
    step: int
    train_steps: int
    tokens: int
    loss: float | None
    stage: str
    step_seconds: float | None
    """Median of the last steps."""
    tokens_per_second: float | None
    """Median of the last steps."""
    usual_tokens_per_second: float | None
    """The run's own median, over the steps at the topology and sequence length of the newest one."""
    is_whole_record: bool
    """False: the record is large, the run's own median is that of steps at even distances, and of restarts without
    Slurm some may be missing."""
    drop: Drop | None
    slow_seconds: float | None
    """How long the drop has lasted, in the time that its steps took."""
    mfu: float | None
    """Median of the last steps."""
    eta_seconds: float | None
    quiet_seconds: float | None
    """Since the last record of a run that trains, where that is unusually long."""
    slow_ranks: list[SlowRanks]
    nodes: list[NodeStatus]
    checkpoint: CheckpointStatus | None
    uploads: UploadStatus | None
    """None where nothing was ever uploaded."""
    restarts: list[RestartStatus]
    validation: dict[str, float]
    """Nats per token by source."""
    evaluation: dict[str, Any]
    """The newest `evaluation` event with figures of the model, or an error."""


def gather(found: FoundRun) -> RunStatus:
    """How the run is now, by what can be read of its files."""
    folder, recipe = found.folder, found.recipe
    damage: list[str] = []
    completed, holder = _read(folder.completed_step, damage), _read(lambda: holder_of(folder.path), damage)
    is_known = not damage
    records = _read(lambda: read_records(folder.metrics_file), damage) or Records(Metrics([], []), False)
    steps, events = records.metrics.steps, records.metrics.events
    last = steps[-1] if steps else None
    attempts = read_attempts(folder.path)
    state, message = _state(found, attempts, holder, completed, is_known=is_known)
    alike = _comparable(steps, events, recipe)
    usual = usual_speed(alike, is_whole=records.is_whole)
    drop = find_drop(alike, usual) if usual is not None and state == "training" else None
    recent = recent_speed(steps)
    reports = read_reports(folder.path)
    step_seconds = statistics.median(step.step_seconds for step in steps[-RECENT_STEPS:]) if steps else None
    return RunStatus(
        run=folder.name,
        path=str(folder.path),
        recipe=str(found.recipe_file),
        state=state,
        message=message,
        damage=damage,
        job=found.jobs[-1].slurm_job if found.jobs else "",
        job_nodes=found.jobs[-1].nodes if found.jobs else 0,
        step=last.step if last else 0,
        train_steps=recipe.tokens.train_steps,
        tokens=last.tokens if last else 0,
        loss=last.loss if last else None,
        stage=last.stage if last else "",
        step_seconds=step_seconds,
        tokens_per_second=recent,
        usual_tokens_per_second=usual,
        is_whole_record=records.is_whole,
        drop=drop,
        slow_seconds=None if drop is None else sum(s.step_seconds for s in steps if s.step >= drop.since_step),
        mfu=recent_mfu(steps),
        eta_seconds=seconds_left(recipe, last.step, recent) if last and recent and state == "training" else None,
        quiet_seconds=_quiet(folder.metrics_file, holder, step_seconds) if state == "training" else None,
        slow_ranks=slow_ranks(reports) if state == "training" else [],
        nodes=nodes_of(reports),
        checkpoint=newest_checkpoint(folder, events),
        uploads=upload_status(folder.path),
        restarts=_restarts(attempts, records, is_training=state in ("training", "unknown")),
        validation=_newest(events, "validation").get("validation_loss", {}),
        evaluation=_newest([event for event in events if _has_figures(event)], "evaluation"),
    )


def _read(read: Callable[[], T], damage: list[str]) -> T | None:
    """What is read; None where that cannot be, which is told."""
    try:
        return read()
    except UserError as error:
        damage.append(str(error))
    except OSError as error:
        damage.append(f"{error.filename}: cannot be read ({error.strerror})")
    return None


def _state(
    found: FoundRun, attempts: Sequence[Attempt], holder: Holder | None, completed: int | None, *, is_known: bool
) -> tuple[State, str]:
    """What the run is doing, as far as its files say; not `is_known`: one that says who trains it, or that it is
    complete, could not be read."""
    folder = found.folder
    if completed is not None and completed >= found.recipe.tokens.train_steps:
        return "complete", ""
    if holder is not None:
        return "training", f"process {holder.pid} on {holder.host} since {holder.since}"
    if not is_known:
        return "unknown", ""
    failure = folder.failure()
    if failure is not None:
        return "failed", failure
    last = attempts[-1] if attempts else None
    newest_job = found.jobs[-1].slurm_job if found.jobs else ""
    if newest_job and newest_job not in {attempt.begin.job for attempt in attempts}:
        return "queued", f"job {newest_job} was submitted and has not begun"
    if last is None:
        return "stopped", ""
    if last.end is None:
        nodes = f"{len(last.begin.nodes)} node{'s' * (len(last.begin.nodes) != 1)}"
        return "begun", f"job {last.begin.job} began on {nodes}, and has not said how it ended"
    if last.end.verdict == "requeue":
        return "queued", f"job {last.begin.job} was put back: {last.end.reason}"
    return ("failed", last.end.reason) if last.end.verdict == "give up" else ("stopped", last.end.reason)


def _comparable(steps: Sequence[StepRecord], events: Sequence[Event], recipe: Recipe) -> list[StepRecord]:
    """The steps at the topology and sequence length of the newest one: others have other speeds."""
    if not steps:
        return []
    lengths = {stage.name: stage_sequence_length(recipe, stage) for stage in recipe.data_stages}
    starts: list[Event] = []
    for start in _starts(events):
        starts = [
            earlier for earlier in starts if earlier["step"] < start["step"]
        ]  # the others' steps are trained again
        starts.append(start)
    first_steps = [start["step"] for start in starts]

    def kind(step: StepRecord) -> tuple[object, int | None]:
        number = bisect_right(first_steps, step.step) - 1
        return starts[number].get("topology") if number >= 0 else None, lengths.get(step.stage)

    newest = kind(steps[-1])
    return [step for step in steps if kind(step) == newest]


def _quiet(metrics_file: Path, holder: Holder | None, step_seconds: float | None) -> float | None:
    """Seconds without a record, of the launch that trains."""
    try:
        age = time.time() - metrics_file.stat().st_mtime
        if holder is not None:
            age = min(age, time.time() - datetime.fromisoformat(holder.since).timestamp())
    except (OSError, ValueError):
        return None
    return age if age > max(QUIET_SECONDS, QUIET_STEPS * (step_seconds or 0.0)) else None


def _restarts(attempts: Sequence[Attempt], records: Records, *, is_training: bool) -> list[RestartStatus]:
    """All starts by their time: of Slurm jobs, and without Slurm."""
    of_jobs = [
        RestartStatus(
            f"{attempt.begin.job}.{attempt.begin.restart}",
            attempt.begin.time,
            attempt.begin.nodes,
            attempt.begin.step,
            attempt.end.verdict if attempt.end else "",
            attempt.end.reason if attempt.end else "",
        )
        for attempt in attempts
    ]
    return sorted([*of_jobs, *_starts_by_hand(records, is_training=is_training)], key=lambda start: start.time)


def _starts_by_hand(records: Records, *, is_training: bool) -> Iterator[RestartStatus]:
    """The starts without Slurm. Of each that has no end, and is not what trains, it is said that nobody knows it."""
    told = [event for event in records.metrics.events if event["event"] in ("start", "end")]
    number = 0
    for event, after in zip_longest(told, told[1:]):
        is_start = event["event"] == "start" and isinstance(event.get("step"), int)
        if not is_start or _text(event, "launch").startswith("slurm-"):
            continue
        number += 1
        if after is not None and after["event"] == "end":
            verdict, reason = _text(after, "verdict"), _text(after, "reason")
        else:
            is_lost = records.is_whole and not (is_training and after is None)
            verdict, reason = ("lost", NO_WORD) if is_lost else ("", "")
        yield RestartStatus(str(number), _text(event, "time"), [], event["step"] - 1, verdict, reason)


def _text(event: Event, key: str) -> str:
    found = event.get(key)
    return found if isinstance(found, str) else ""


def _starts(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event["event"] == "start" and isinstance(event.get("step"), int)]


def _has_figures(event: Event) -> bool:
    """Whether an evaluation says something of the model; the one at a run's end may tell of the bigram model alone."""
    return any(event.get(name) for name in ("source_loss", "arithmetic", "benchmarks", "error"))


def _newest(events: Sequence[Event], name: str) -> Event:
    return next((event for event in reversed(events) if event["event"] == name), {})
