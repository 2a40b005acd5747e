"""What a run does about numbers that are wrong: skipped steps and loss spikes are recorded, and some end the run.

Every rank knows the loss and whether the step was skipped, so all of them judge alike without talking to each other.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

from launch.train.metrics import Event

FailureKind = Literal["skipped_steps", "replicas"]

MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""

SMALLEST_DEVIATION = 0.005
"""Of the median: a loss that hardly moves would make a spike of every wobble."""


class RunFailed(RuntimeError):
    """The run ends with exit code 1 on all ranks, for a reason that a restart alone would not take away."""

    def __init__(self, kind: FailureKind, step: int, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.step = step


class SkippedSteps:
    """Counts the skipped steps in a row.

    Args:
        limit: so many end the run.
        sources_of: says of a step which sources its batch is from.
    """

    def __init__(self, limit: int, sources_of: Callable[[int], list[str]]) -> None:
        self._limit = limit
        self._sources_of = sources_of
        self._in_a_row: dict[int, list[str]] = {}

    def observe(self, step: int, skipped: bool) -> Event | None:
        """Note how a step went; the event to record where it was skipped."""
        if not skipped:
            self._in_a_row.clear()
            return None
        self._in_a_row[step] = self._sources_of(step)
        return {"event": "skipped", "step": step, "sources": self._in_a_row[step], "in_a_row": len(self._in_a_row)}

    def check(self) -> None:
        """Raise RunFailed, naming steps and sources, where there are too many."""
        if len(self._in_a_row) < self._limit:
            return
        steps = "; ".join(f"step {step}: {', '.join(sources)}" for step, sources in self._in_a_row.items())
        raise RunFailed(
            "skipped_steps",
            max(self._in_a_row),
            f"the loss or the gradient norm was not finite in {len(self._in_a_row)} steps in a row "
            f"(guards.max_skipped_steps), read from: {steps}",
        )


class SpikeDetector:
    """Finds losses far above those of the steps before, by their median and median absolute deviation (MAD).

    Args:
        window: number of steps to compare with, of the same data stage; nothing is found before there are so many.
        threshold: standard deviations above the median.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self._threshold = threshold
        self._losses: deque[float] = deque(maxlen=window)
        self._stage = ""

    def state(self) -> dict[str, Any]:
        """What has to be remembered for the next losses to be judged as without an interruption; small, for JSON."""
        return {"stage": self._stage, "losses": list(self._losses)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; of another window's losses the last ones count. An empty one is a beginning."""
        self._stage = str(state.get("stage", ""))
        self._losses.clear()
        self._losses.extend(state.get("losses", ()))

    def observe(self, step: int, loss: float, stage: str) -> Event | None:
        """Note a step's loss; the event to record where it is a spike. A loss that is not finite is none."""
        if not math.isfinite(loss) or self._losses.maxlen == 0:
            return None
        if stage != self._stage:
            self._losses.clear()
            self._stage = stage
        spike = self._judge(step, loss) if len(self._losses) == self._losses.maxlen else None
        self._losses.append(loss)
        return spike

    def _judge(self, step: int, loss: float) -> Event | None:
        median = statistics.median(self._losses)
        mad = statistics.median(abs(other - median) for other in self._losses)
        limit = median + self._threshold * max(MAD_TO_DEVIATION * mad, SMALLEST_DEVIATION * abs(median))
        if loss <= limit:
            return None
        return {"event": "spike", "step": step, "spike_loss": loss, "median": median, "limit": limit}
