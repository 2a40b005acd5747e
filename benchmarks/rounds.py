"""Fair timing on a machine whose speed drifts: contestants take turns in short blocks, ratios are taken per round."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch.distributed as torch_dist


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of each contestant in each round, after one round that does not count.

    All ranks of the default process group must call this alike. The order is turned round every round.
    With `time.process_time` as the clock, the process's own time counts, on a machine that others use as well.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(rounds + 1):
        order = list(contestants) if round_number % 2 == 0 else list(contestants)[::-1]
        for name in order:
            torch_dist.barrier()
            start = clock()
            for _ in range(steps):
                contestants[name]()
            torch_dist.barrier()
            if round_number > 0:
                seconds[name].append((clock() - start) / steps)
    return seconds


def seconds_of(function: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def spread(values: list[float], digits: int = 2) -> str:
    """Median (smallest to largest)."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
