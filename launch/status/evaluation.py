"""An evaluation for people."""

from collections.abc import Mapping
from typing import Any


def evaluation_text(event: Mapping[str, Any]) -> str:
    """An `evaluation` event in a line."""
    parts = [f"step {event.get('step')}"]
    losses = event.get("source_loss")
    if isinstance(losses, dict):
        parts += [f"{name} {figure(loss)}" for name, loss in losses.items()]
    arithmetic = event.get("arithmetic")
    if isinstance(arithmetic, dict):
        parts.append(f"arithmetic {arithmetic.get('correct')} of {arithmetic.get('total')}")
    benchmarks = event.get("benchmarks")
    if isinstance(benchmarks, dict):
        parts += [f"{task} {figure(next(iter(metrics.values()), None))}" for task, metrics in benchmarks.items()]
    if event.get("error"):
        parts.append(f"failed: {event['error']}")
    return " · ".join(parts)


def figure(value: object) -> str:
    """Four digits, n/a for what is no number."""
    return f"{value:.4f}" if isinstance(value, int | float) else "n/a"
