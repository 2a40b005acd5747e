"""A picture of a run: `python -m launch.train.loss_plot runs/tiny-1/metrics.jsonl loss.png`.

Imports matplotlib inside functions, and draws on figures of its own: nothing here needs or changes a display.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from launch.train.arguments import Parser
from launch.train.metrics import Metrics, StepRecord, read_metrics
from launch.train.streams import say
from nanotron_recipes.errors import UserError
from nanotron_recipes.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FloatArray = npt.NDArray[np.float64]

SMOOTHING = 0.02
"""The smoothed loss is a mean over this share of the run's steps."""
_MOST_POINTS = 4000
_TRAINING = "#404040"
_SOURCES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours that people with any kind of colour vision can tell apart (Okabe and Ito)."""
_STAGES = ("#f4f4f4", "#e6e6e6")


def plot_losses(metrics: Metrics, out: Path) -> None:
    """Draw training loss, validation loss of each source, learning rate and data stages over the steps into `out`.

    Raises:
        UserError: there is no step to draw.
    """
    from matplotlib.figure import Figure

    if not metrics.steps:
        raise UserError(f"{out}: nothing to draw; the run has recorded no step yet")
    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _draw_stages(metrics.steps, losses, rates)
    _draw_training(metrics.steps, losses)
    _draw_validation(metrics, losses)
    losses.set_ylabel("loss (nats per token)")
    losses.set_ylim(bottom=0)
    # Losses fall: the upper right corner is free, below the names of the stages.
    losses.legend(loc="upper right", bbox_to_anchor=(1, 0.94), framealpha=0.9, fontsize=9)
    rates.plot(*_thinned(_column(metrics.steps, "step"), _column(metrics.steps, "lr")), color=_TRAINING, linewidth=1.2)
    rates.set_ylabel("learning\nrate")
    rates.set_ylim(bottom=0)
    rates.set_xlabel("step")
    rates.set_xlim(0, metrics.steps[-1].step)
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(axis="x", style="plain")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_atomic(out, picture.getvalue())


def smoothed(values: FloatArray, window: int) -> FloatArray:
    """Mean of the finite values among the `window` neighbours (an odd number is centred) of each value, float64 [n]."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    positions = np.arange(len(values))
    first = np.maximum(positions - window // 2, 0)
    end = np.minimum(positions - window // 2 + window, len(values))
    number = counts[end] - counts[first]
    return np.where(number > 0, (sums[end] - sums[first]) / np.maximum(number, 1), np.nan)


def _draw_stages(steps: Sequence[StepRecord], losses: Axes, rates: Axes) -> None:
    """Shade every stage; its name stands at the top of its part."""
    for number, (stage, records) in enumerate(_by_stage(steps)):
        first, last = records[0].step - 1, records[-1].step
        for axes in (losses, rates):
            axes.axvspan(first, last, color=_STAGES[number % 2], linewidth=0, zorder=0)
        losses.annotate(
            stage,
            xy=((first + last) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=9,
            color="#606060",
        )


def _draw_training(steps: Sequence[StepRecord], axes: Axes) -> None:
    """Every step's loss, pale, and its mean over neighbours of the same stage (a change of mixture is a step)."""
    window = 2 * round(SMOOTHING * len(steps) / 2) + 1
    axes.plot(*_thinned(_column(steps, "step"), _column(steps, "loss")), color=_TRAINING, alpha=0.2, linewidth=0.7)
    label: str | None = f"training, mean of {window} steps" if window > 1 else "training"
    for _, records in _by_stage(steps):
        means = smoothed(_column(records, "loss"), window)
        axes.plot(*_thinned(_column(records, "step"), means), color=_TRAINING, linewidth=1.5, label=label)
        label = None


def _draw_validation(metrics: Metrics, axes: Axes) -> None:
    """The held-out loss of each source; of a step that was validated again after a resume the last one counts."""
    curves: dict[str, dict[int, float]] = {}
    for event in metrics.events:
        if event["event"] == "validation":
            for source, loss in event["validation_loss"].items():
                if loss is not None:
                    curves.setdefault(source, {})[event["step"]] = loss
    for number, (source, points) in enumerate(curves.items()):
        color = _SOURCES[number % len(_SOURCES)]
        order = sorted(points)
        heights = [points[step] for step in order]
        label = f"validation: {source}"
        # The first and the last point lie on the frame, which would cut their marks in half.
        axes.plot(order, heights, color=color, marker="o", markersize=5, linewidth=1.3, label=label, clip_on=False)


def _by_stage(steps: Iterable[StepRecord]) -> list[tuple[str, list[StepRecord]]]:
    return [(stage, list(records)) for stage, records in groupby(steps, key=lambda record: record.stage)]


def _column(steps: Sequence[StepRecord], name: str) -> FloatArray:
    """One number of every record, NaN where it is unknown."""
    return np.array([getattr(record, name) for record in steps], dtype=np.float64)


def _thinned(steps: FloatArray, values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """At most so many points as a picture can show."""
    stride = -(-len(steps) // _MOST_POINTS)
    return steps[::stride], values[::stride]


def main() -> int:
    """Draw a metrics.jsonl into a PNG file."""
    parser = Parser(prog="launch.train.loss_plot", description="Draw the losses of a run.")
    parser.add_argument("metrics", type=Path, help="a run's metrics.jsonl")
    parser.add_argument("out", type=Path, help="PNG file to write")
    at_hand = Path()
    try:
        arguments = parser.parse_args()
        at_hand = arguments.metrics
        metrics = read_metrics(at_hand)
        at_hand = arguments.out
        plot_losses(metrics, at_hand)
    except UserError as error:
        say(f"error: {error}", error=True)
        return 2
    except OSError as error:
        say(f"error: {at_hand}: {error.strerror}", error=True)
        return 2
    say(str(arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
