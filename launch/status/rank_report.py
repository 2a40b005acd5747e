"""What each rank says of itself now and then: runs/<name>/ranks/<rank>.json, read by `status`.

One file a rank, written whole; no rank waits for another to write it.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from launch.status.gpu import GpuHealth
from nanotron_recipes.files import write_atomic

FOLDER = "ranks"
WINDOW_STEPS = (10, 100)
"""Steps of the windows of either size. They end at multiples of it, so that those of all ranks are of the same steps;
where steps are short, two files may be more short windows apart than are kept."""
KEPT_WINDOWS = 12
"""Of each size."""


@dataclass(frozen=True)
class Window:
    """Medians over some steps."""

    steps: int
    """How many, one of WINDOW_STEPS."""
    last_step: int
    compute_seconds: float | None
    """Of the rank's own part of a step, see `launch.train.step_clock`; None where that cannot be told."""
    data_wait_seconds: float
    """Waiting for the rank's own loader."""

    @property
    def own_seconds(self) -> float | None:
        """What a step takes on this rank before it waits for others."""
        return None if self.compute_seconds is None else self.compute_seconds + self.data_wait_seconds


@dataclass(frozen=True)
class RankReport:
    """A rank, when it was last heard."""

    rank: int
    launch: str
    """Of one start of the ranks; reports of others are old."""
    host: str
    node: str
    pp_rank: int
    tp_group: int
    """The first rank of its tensor-parallel group."""
    time: float
    """Seconds since the epoch, by the rank's clock."""
    step: int
    """The last one that it has trained; 0 before the first."""
    memory_bytes: int
    """Its peak: allocated on the GPU, else resident."""
    windows: list[Window]
    """Of each size, ascending."""
    gpu: GpuHealth | None


class StepWindows:
    """Collects a rank's steps into windows."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, float | None, float]] = []
        self._windows: dict[int, list[Window]] = {size: [] for size in WINDOW_STEPS}

    def observe(self, step: int, compute_seconds: float | None, data_wait_seconds: float) -> None:
        """Note a step; one that was trained before is trained again, after a rewind."""
        if self._steps and step != self._steps[-1][0] + 1:
            self._steps.clear()
            self._windows = {
                size: [window for window in windows if window.last_step < step]
                for size, windows in self._windows.items()
            }
        self._steps = [*self._steps[1 - max(WINDOW_STEPS) :], (step, compute_seconds, data_wait_seconds)]
        for size, windows in self._windows.items():
            if step % size == 0 and len(self._steps) >= size:
                self._windows[size] = [*windows, _window(self._steps[-size:])][-KEPT_WINDOWS:]

    def newest(self) -> list[Window]:
        """The last windows of each size, ascending."""
        return [window for size in WINDOW_STEPS for window in self._windows[size]]


def _window(steps: list[tuple[int, float | None, float]]) -> Window:
    known = [seconds for _, seconds, _ in steps if seconds is not None]
    compute = statistics.median(known) if len(known) == len(steps) else None
    return Window(len(steps), steps[-1][0], compute, statistics.median(waited for _, _, waited in steps))


def write_report(run: Path, report: RankReport) -> None:
    """Write a rank's file. Raises OSError."""
    write_atomic(run / FOLDER / f"{report.rank}.json", json.dumps(asdict(report)) + "\n")


def read_reports(run: Path) -> list[RankReport]:
    """What the ranks of the newest start have said, by rank. A file that cannot be read counts as absent."""
    found = list(_readable(run / FOLDER))
    newest = max(found, key=lambda report: report.time, default=None)
    return sorted((each for each in found if newest and each.launch == newest.launch), key=lambda each: each.rank)


def _readable(folder: Path) -> Iterator[RankReport]:
    for file in folder.glob("*.json"):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            windows = [Window(**window) for window in content["windows"]]
            gpu = None if content["gpu"] is None else GpuHealth(**content["gpu"])
            yield _typed({**content, "windows": windows, "gpu": gpu})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue


def _typed(content: dict[str, Any]) -> RankReport:
    """Raises KeyError, TypeError or ValueError for what is no report."""
    for field in fields(RankReport):
        value = content[field.name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (field.type is int and type(value) is not int) or (field.type is float and not is_number):
            raise ValueError(field.name)
    return RankReport(**{field.name: content[field.name] for field in fields(RankReport)})
