"""The run's records as TensorBoard curves."""

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.train.metrics import Event, StepRecord
from launch.train.outage import Outage
from launch.train.streams import say


class TensorBoard:
    """A callback that writes event files, read with `tensorboard --logdir`.

    What cannot be written (a full disk) is left out; when there is room again, another event file begins.
    """

    def __init__(self, folder: Path, first_step: int, tell: Callable[[str], None] = say) -> None:
        """Write to `folder`; curves of an earlier start are cut from `first_step` on, which is trained again.

        `tell` is given a line when nothing can be written any more, and when something can again.
        """
        self._folder = folder
        self._cut_from = first_step if first_step > 1 else None
        self._file: _EventFile | None = None
        self._outage = Outage(
            str(folder), "training goes on without new points for TensorBoard", "new points are written again", tell
        )

    def on_step(self, record: StepRecord) -> None:
        """Write every number of a step under `train/`."""
        self._add({f"train/{name}": value for name, value in scalars(record).items()}, record.step)

    def on_event(self, event: Event) -> None:
        """Write validation losses under `validation/`, what was evaluated under `evaluation/`; where the run goes back,
        cut the curves."""
        if event["event"] == "rewind" and event["to"] is not None:
            self.close()
            self._cut_from = event["to"] + 1
        elif event["event"] == "validation":
            losses = event["validation_loss"].items()
            self._add({f"validation/{source}": loss for source, loss in losses if loss is not None}, event["step"])
        elif event["event"] == "evaluation":
            self._add({f"evaluation/{name}": value for name, value in evaluated(event).items()}, event["step"])

    def close(self) -> None:
        """Close the event file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _add(self, values: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        try:
            if self._file is None:
                self._file = _EventFile(self._folder, self._cut_from)
                self._cut_from = None
            self._file.write(step=step, summary=summary)
        except OSError as error:
            self.close()  # it may end within a record: no reader finds what would follow
            self._outage.failed(error)
        else:
            self._outage.succeeded()


class _EventFile:
    """A new event file. torch's writer has a thread, whose errors come out later, somewhere else and as tracebacks."""

    def __init__(self, folder: Path, cut_from: int | None) -> None:
        """Where `cut_from` is given, readers forget what older files say of that step and later ones."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # Readers take the files of a folder in the order of their names.
        path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = path.open("xb")
        self._records = RecordWriter(self._file)
        try:
            self.write(file_version="brain.Event:2")
            if cut_from is not None:
                self.write(step=cut_from, session_log=SessionLog(status=SessionLog.START))
        except OSError:
            self.close()
            path.unlink()
            raise

    def write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as EventProto

        self._records.write(EventProto(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # of a disk that is full, or a server that is gone
            self._file.close()


def scalars(record: StepRecord) -> dict[str, float]:
    """The numbers of a step that make curves, by name."""
    values = dataclasses.asdict(record)
    return {name: float(value) for name, value in values.items() if name != "step" and isinstance(value, int | float)}


def evaluated(event: Event) -> dict[str, float]:
    """The numbers of an evaluation that make curves, by name."""
    values = {f"loss/{source}": loss for source, loss in event.get("source_loss", {}).items()}
    arithmetic = event.get("arithmetic", {})
    if arithmetic.get("total"):
        values["arithmetic"] = arithmetic["correct"] / arithmetic["total"]
    for task, metrics in event.get("benchmarks", {}).items():
        values |= {f"{task}/{metric}": value for metric, value in metrics.items()}
    return {name: value for name, value in values.items() if value is not None}
