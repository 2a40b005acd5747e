"""How a stage's training went, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LOSS = {"loss": "Loss"}
_PANELS = {
    "sft": {
        "loss": "Loss (nats per token)",
        "mean_token_accuracy": "Tokens foretold (share of the learnt ones)",
        "eval_loss": "Loss on held-out rows (nats per token)",
    },
    "prefer": {
        "loss": "Loss (per pair)",
        "rewards/accuracies": "Chosen answer's reward is higher (share of pairs)",
        "rewards/margins": "Margin of rewards, training pairs (nats × β)",
        "eval_rewards/margins": "Margin of rewards, held-out pairs (nats × β)",
    },
    "grpo": {
        "reward": "Reward (weighted sum, mean of the answers)",
        "rewards/accuracy/mean": "Right answers (share)",
        "completions/mean_length": "Length of answers (tokens)",
        "entropy": "Entropy (nats per token)",
    },
}
"""Command → metric, with TRL's name → title of its panel."""

_COLUMNS = 2
_PANEL_INCHES = (4.8, 3.0)
_MEAN_OVER = 10
"""A running mean is over this part of all points: a tenth."""

Points = Sequence[tuple[int, float]]


def plot_stage(command: str, records: Sequence[Mapping[str, Any]], target: Path) -> bool:
    """Draw what a stage of that command logged; False where it logged nothing that is drawn.

    A panel a metric: every value, and over many of them their running mean.
    """
    curves = {title: _points(records, name) for name, title in _PANELS.get(command, _LOSS).items()}
    curves = {title: points for title, points in curves.items() if points}
    if not curves:
        return False
    # The object interface: no window, and no state that a second figure would share.
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, points) in zip(panels, curves.items(), strict=False):
        _draw(axes, title, points)
    for axes in list(panels):
        axes.set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120, metadata={"Software": None})
    return True


def running_mean(points: Points, window: int) -> list[tuple[int, float]]:
    """The mean of each `window` points in a row, at the step of the last of them; it begins when there are so many."""
    values = [value for _, value in points]
    return [(points[end - 1][0], sum(values[end - window : end]) / window) for end in range(window, len(values) + 1)]


def _draw(axes: Any, title: str, points: Points) -> None:
    window = len(points) // _MEAN_OVER
    steps, values = zip(*points, strict=True)
    if window > 1:
        axes.plot(steps, values, color="C0", alpha=0.3, linewidth=1, label="each logged step")
        axes.plot(*zip(*running_mean(points, window), strict=True), color="C0", linewidth=2, label=f"mean of {window}")
        axes.legend(fontsize=8)
    else:
        axes.plot(steps, values, color="C0", linewidth=1.5, marker=".")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _points(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in records if isinstance(record.get(name), int | float)]
