"""metrics.jsonl: the record of a run that tests, plots, ablations and status read."""

import dataclasses
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from launch.train.outage import Outage, reason
from launch.train.streams import say
from parallel.checkpoint_files import is_count

EventName = Literal[
    "start",
    "validation",
    "evaluation",
    "checkpoint",
    "upload",
    "slow_upload",
    "upload_problem",
    "skipped",
    "spike",
    "rewind",
    "end",
]
Event = dict[str, Any]
"""A record other than a step's: `event` (an EventName), mostly `step`, and what belongs to that event."""


@dataclass(frozen=True)
class StepRecord:
    """What is written about one training step. None where a value is unknown or was not finite."""

    step: int
    """Counts from 1."""
    tokens: int
    """Consumed after this step, since the first one, by the whole run."""
    loss: float | None
    """Nats per valid target of the global batch, before this step's update, at full precision."""
    lr: float
    """The rate that this step trained with."""
    grad_norm: float | None
    """L2 norm of the whole gradient before clipping."""
    tokens_per_second: float
    """Of the whole run, not of one rank."""
    step_seconds: float
    """Wall time of the step from its beginning; validations, saves and records between two steps are in none."""
    data_wait_seconds: float
    """The part of it spent waiting for the loader."""
    memory_peak_bytes: int
    """Largest memory of a rank so far: allocated on the GPU, else resident."""
    mfu: float | None
    """Model FLOPs per second as a fraction of the devices' peak; None where the peak is unknown."""
    stage: str
    """Name of the data stage."""


class Callback(Protocol):
    """Something that is told what happens in a run: the file, the live line, TensorBoard, wandb."""

    def on_step(self, record: StepRecord) -> None:
        """Called on rank 0 after every step."""

    def on_event(self, event: Event) -> None:
        """Called on rank 0 for every record that is not a step's."""

    def close(self) -> None:
        """Called once, however the run ends."""


class RecordsLost(OSError):
    """Records of a run could not be written, and its process ends."""


class MetricsWriter:
    """A callback that appends to metrics.jsonl, one whole line a system call.

    No record ends a training. Lines that cannot be written (a full disk, a server that is gone) are kept in memory,
    and written in their order with the first record that finds room again.
    """

    def __init__(self, path: Path, tell: Callable[[str], None] = say) -> None:
        """Open or make `path`; a last line that a crash cut short is closed first, and readers ignore it.

        `tell` is given a line when the file cannot be written any more, and when it has all records again.
        Raises OSError where it cannot be opened.
        """
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines: deque[bytes] = deque()
        self._file: _LineFile | None = _LineFile(path)
        self._outage = Outage(
            str(path), "training goes on, records wait in memory", "written again, with every record", tell
        )

    def on_step(self, record: StepRecord) -> None:
        """Append the record of a step."""
        self._append(dataclasses.asdict(record))

    def on_event(self, event: Event) -> None:
        """Append another record; raises ValueError for one that readers would take for a step's."""
        if "event" not in event or "loss" in event:
            raise ValueError(f"a record that is not a step's needs 'event' and may not have 'loss': {event}")
        self._append(event)

    def close(self) -> None:
        """Write what is waiting, flush to the disk and close the file; raises RecordsLost where that fails."""
        try:
            self._write()
        except OSError as error:
            count = f"{len(self._lines)} record{'s' if len(self._lines) > 1 else ''}"
            raise RecordsLost(f"{self._path}: {count} lost: {reason(error)}") from error
        self._outage.succeeded()
        assert self._file is not None
        try:
            self._file.flush()
        except OSError as error:
            raise RecordsLost(f"{self._path}: its last records may be lost: {reason(error)}") from error
        finally:
            self._file.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps(_finite(record), allow_nan=False).encode() + b"\n")
        try:
            self._write()
        except OSError as error:
            self._outage.failed(error)
        else:
            self._outage.succeeded()

    def _write(self) -> None:
        """Write all lines; those that cannot be written stay. A file that failed is opened anew: a handle may be
        stale for ever."""
        if self._file is None:
            self._file = _LineFile(self._path)
        try:
            while self._lines:
                self._file.write(self._lines[0])
                self._lines.popleft()
        except OSError:
            self._file.close()
            self._file = None
            raise


class _LineFile:
    """A file that lines are appended to. A last line without an end is closed by the first new one."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(self._descriptor).st_size
            is_in_line = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        except OSError:
            self.close()
            raise
        self._before = b"\n" if is_in_line else b""

    def write(self, line: bytes) -> None:
        rest, self._before = self._before + line, b""
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]  # less than all on a full disk, and next time why

    def flush(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        with suppress(OSError):  # of a server that is gone, or what `flush` has told
            os.close(self._descriptor)


@dataclass(frozen=True)
class Metrics:
    """What metrics.jsonl says."""

    steps: list[StepRecord]
    """One record a step, ascending, of the steps that the run has now: a resume or a rewind takes away those that are
    to be trained again."""
    events: list[Event]
    """All other records in the order of writing."""


def read_metrics(path: Path) -> Metrics:
    """Read `path`. Lines that do not parse, and records with values of other types, are ignored; unknown keys too."""
    return parse_metrics(path.read_bytes().split(b"\n"))


def parse_metrics(lines: Iterable[bytes]) -> Metrics:
    """Read lines of such a file, as `read_metrics` does."""
    steps: list[StepRecord] = []
    events: list[Event] = []
    for line in lines:
        record = _parse(line)
        if record is None:
            continue
        if "loss" in record:
            step = _step_record(record)
            if step is not None:
                _forget_from(steps, step.step)
                steps.append(step)
        elif _is_event(record):
            events.append(record)
            if record["event"] == "start" and is_count(record.get("step")):
                _forget_from(steps, record["step"])
            elif record["event"] == "rewind" and record["to"] is not None:
                _forget_from(steps, record["to"] + 1)
    return Metrics(steps, events)


def _forget_from(steps: list[StepRecord], first: int) -> None:
    """Take away the records of step `first` and later ones."""
    while steps and steps[-1].step >= first:
        steps.pop()


def kept_checkpoints(events: Iterable[Event]) -> dict[int, Event]:
    """The newest record of each step whose checkpoint was written whole; a rewind has deleted those after its step."""
    kept: dict[int, Event] = {}
    for event in events:
        if event["event"] == "checkpoint" and not event["error"]:
            kept[event["step"]] = event
        elif event["event"] == "rewind" and event["to"] is not None:
            kept = {step: saved for step, saved in kept.items() if step <= event["to"]}
    return kept


def validation_event(step: int, loss: Mapping[str, float]) -> Event:
    """The record of a validation after `step`; `loss` in nats per token, by source."""
    return {"event": "validation", "step": step, "validation_loss": dict(loss)}


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _step_record(record: Mapping[str, Any]) -> StepRecord | None:
    """The record of a step, None where a value is not of its type."""
    values = {field.name: record.get(field.name) for field in dataclasses.fields(StepRecord)}
    for field in dataclasses.fields(StepRecord):
        value = values[field.name]
        if field.type == float | None:
            is_right = value is None or _is_number(value)
        elif field.type is float:
            is_right = _is_number(value)
        else:
            is_right = isinstance(value, str) if field.type is str else is_count(value)
        if not is_right:
            return None
    return StepRecord(**values)  # type: ignore[arg-type]


def _is_event(record: Mapping[str, Any]) -> bool:
    """Whether a record is an event; of those that are read again, whether it has what is read."""
    match record.get("event"):
        case "validation":
            return is_count(record.get("step")) and _are_numbers(record.get("validation_loss"))
        case "evaluation":
            arithmetic = record.get("arithmetic", {"correct": 0, "total": 0})
            is_right = isinstance(arithmetic, dict) and all(is_count(arithmetic.get(k)) for k in ("correct", "total"))
            figures = [record.get(name, {}) for name in ("bigram_bits_per_byte", "source_loss")]
            benchmarks = record.get("benchmarks", {})
            figures += benchmarks.values() if isinstance(benchmarks, dict) else [benchmarks]
            return is_count(record.get("step")) and is_right and all(map(_are_numbers, figures))
        case "checkpoint":
            return is_count(record.get("step")) and is_count(record.get("num_bytes")) and "error" in record
        case "rewind":
            return "to" in record and (record["to"] is None or is_count(record["to"]))
        case name:
            return isinstance(name, str)


def _are_numbers(by_source: object) -> bool:
    return isinstance(by_source, dict) and all(value is None or _is_number(value) for value in by_source.values())


def _is_number(value: object) -> bool:
    """A number that a float can hold; JSON's own are finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _finite(value: Any) -> Any:
    """`value` with every number that JSON has no word for replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_finite(item) for item in value]
    return value
