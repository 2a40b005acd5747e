"""How far a tokenization is: every worker notes what it has read and encoded, the process that waits adds it up."""

import json
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta

from data.rejected import Rejected
from data.tokenization_job import Job, Task
from nanotron_recipes.numbers import short_number

_NOTE_SECONDS = 1.0
_GENERATED_BYTES = 4e6
"""Stands for a task that reads no files."""
_WINDOW_SECONDS = 60.0
"""Rates are those of the last so many seconds."""


class TaskProgress:
    """Notes how far a task is, about once a second."""

    def __init__(self, job: Job, rank: int, rejected: Rejected) -> None:
        self._file = job.progress_of(rank)
        self._rejected = rejected
        self._tokens = 0
        self._next = 0.0
        self._file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, tokens: int) -> None:
        """So many tokens more have been made."""
        self._tokens += tokens
        if time.monotonic() >= self._next:
            self.note()
            self._next = time.monotonic() + _NOTE_SECONDS

    def note(self) -> None:
        """Writes it down."""
        beside = self._file.with_suffix(".tmp")
        beside.write_text(json.dumps({"bytes": self._rejected.bytes_read, "tokens": self._tokens}))
        beside.replace(self._file)


@dataclass(frozen=True)
class State:
    """Of all tasks together."""

    fraction: float
    """Part of the work that is done, 0 to 1."""
    tokens: int
    """That have been made."""


def forget_incomplete(job: Job) -> None:
    """Removes what interrupted tasks noted: they begin again."""
    for rank in range(len(job.tasks)):
        if not job.is_complete(rank):
            job.progress_of(rank).unlink(missing_ok=True)


def state_of(job: Job) -> State:
    """How far the job's tasks are."""
    done = total = 0.0
    tokens = 0
    for rank, task in enumerate(job.tasks):
        weight = _weight(job, task)
        total += weight
        try:
            noted = json.loads(job.progress_of(rank).read_bytes())
        except FileNotFoundError:
            continue
        tokens += noted["tokens"]
        read = noted["bytes"] / task.size if task.size else 0.0
        done += weight * (1.0 if job.is_complete(rank) else min(1.0, read))
    return State(done / total if total else 1.0, tokens)


def _weight(job: Job, task: Task) -> float:
    """What is held out is little of what is read, and encoding is what takes the time."""
    share = job.corpus.validation_fraction if task.split == "validation" else 1.0
    return (task.size or _GENERATED_BYTES) * share


@dataclass
class Rates:
    """Turns states into a line with speed and time left."""

    _seen: deque[tuple[float, State]] = field(default_factory=deque)

    def line(self, now: float, state: State) -> str:
        """What is said at time `now` in seconds, of whatever clock."""
        self._seen.append((now, state))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _WINDOW_SECONDS:
            self._seen.popleft()
        then, before = self._seen[0]
        seconds, made, done = now - then, state.tokens - before.tokens, state.fraction - before.fraction
        parts = [f"{short_number(state.tokens)} tokens"]
        if seconds > 0 and made > 0:
            parts.append(f"{short_number(made / seconds)} tokens/s")
        if seconds > 0 and done > 0:
            parts.append(f"{timedelta(seconds=round((1 - state.fraction) * seconds / done))} left")
        return ", ".join(parts)
