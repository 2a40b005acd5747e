"""What a run's own figures say about its speed: when it will be done, whether it has become slow, and which ranks are.

Plain functions of records; nothing is read here.
"""

import statistics
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.status.rank_report import WINDOW_STEPS, RankReport, Window
from launch.train.metrics import StepRecord
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import tokens_through

RECENT_STEPS = 20
"""A speed is the median over so many steps."""
SLOW = 0.8
"""Below so much of the run's own median, a run has become slow."""
SLOW_RANK = 1.2
"""More than so many times the middle rank's own time, and a rank is slow."""
SUSTAINED_WINDOWS = 3
"""In so many windows in a row (see `launch.status.rank_report`)."""
_MOST_KEPT = 20_000
_STRETCHES = 64


@dataclass(frozen=True)
class Drop:
    """A sustained drop of a run's speed."""

    since_step: int
    tokens_per_second: float
    """Median of the last RECENT_STEPS steps."""
    usual: float
    """The run's own median."""

    def __str__(self) -> str:
        share = self.tokens_per_second / self.usual
        return (
            f"{self.tokens_per_second:,.0f} tokens/s since step {self.since_step}, {share:.0%} of the run's median "
            f"({self.usual:,.0f})"
        )


def recent_speed(steps: Sequence[StepRecord]) -> float | None:
    """Median tokens per second of the last steps; None without any."""
    return statistics.median(step.tokens_per_second for step in steps[-RECENT_STEPS:]) if steps else None


def recent_mfu(steps: Sequence[StepRecord]) -> float | None:
    """Median model FLOPs utilization of the last steps; None without any, or where the newest has none."""
    if not steps or steps[-1].mfu is None:
        return None
    return statistics.median(step.mfu for step in steps[-RECENT_STEPS:] if step.mfu is not None)


def usual_speed(steps: Sequence[StepRecord], *, is_whole: bool) -> float | None:
    """The run's own median of tokens per second over comparable steps, ascending; None for fewer than 2 × RECENT_STEPS.

    Without `is_whole` the last steps are there, and of those before a part: then it is the median of the medians of
    stretches of equal length, so that the many last ones have no more weight than they are of the run.
    """
    if len(steps) < 2 * RECENT_STEPS:
        return None
    if is_whole:
        return statistics.median(step.tokens_per_second for step in steps)
    first, length = steps[0].step, steps[-1].step - steps[0].step + 1
    stretches: dict[int, list[float]] = {}
    for step in steps:
        stretches.setdefault((step.step - first) * _STRETCHES // length, []).append(step.tokens_per_second)
    return statistics.median(map(statistics.median, stretches.values()))


def find_drop(steps: Sequence[StepRecord], usual: float) -> Drop | None:
    """The drop that the last of `steps` (ascending) are in: each window of RECENT_STEPS steps since its beginning has a
    median below SLOW × `usual`."""
    speeds = [step.tokens_per_second for step in steps]
    end = len(speeds)
    while end >= RECENT_STEPS and statistics.median(speeds[end - RECENT_STEPS : end]) < SLOW * usual:
        end -= 1
    if end == len(speeds) or len(speeds) < RECENT_STEPS:
        return None
    # The first slow step of the earliest slow window.
    earliest = steps[max(0, end + 1 - RECENT_STEPS) :]
    since = next(step.step for step in earliest if step.tokens_per_second < SLOW * usual)
    return Drop(since, statistics.median(speeds[-RECENT_STEPS:]), usual)


class SpeedWatch:
    """Notices, step by step, that a run becomes slow: judged as `find_drop` does, once there are 2 × RECENT_STEPS steps
    of one sequence length.

    Args:
        length_of: says of a step how long its sequences are; with other lengths other speeds are usual.
    """

    def __init__(self, length_of: Callable[[int], int]) -> None:
        self._length_of = length_of
        self._length: int | None = None
        self._forget()

    def _forget(self) -> None:
        self._recent: deque[StepRecord] = deque(maxlen=RECENT_STEPS)
        self._sorted: list[float] = []
        self._stride = 1
        self._is_slow = False

    def observe(self, record: StepRecord) -> Drop | None:
        """Note a step; the drop when one has just been found, once for each."""
        length = self._length_of(record.step)
        if length != self._length:
            self._length = length
            self._forget()
        self._recent.append(record)
        if record.step % self._stride == 0:
            insort(self._sorted, record.tokens_per_second)
        if len(self._sorted) > _MOST_KEPT:  # every second one has the same median
            self._sorted = self._sorted[::2]
            self._stride *= 2
        if len(self._sorted) * self._stride < 2 * RECENT_STEPS:
            return None
        usual = self._sorted[len(self._sorted) // 2]
        drop = find_drop(list(self._recent), usual)
        is_new = drop is not None and not self._is_slow
        self._is_slow = drop is not None
        return drop if is_new else None


def seconds_left(recipe: Recipe, step: int, tokens_per_second: float) -> float:
    """Until the recipe's last step, at this speed."""
    last = recipe.tokens.train_steps
    if step >= last:
        return 0.0
    return (tokens_through(recipe, last) - tokens_through(recipe, step)) / tokens_per_second


@dataclass(frozen=True)
class SlowRanks:
    """Ranks that make the others wait: one, or a tensor-parallel group, whose ranks cannot be told apart."""

    ranks: list[int]
    nodes: list[str]
    times: float
    """Their own time in the last window, as a multiple of that of the middle rank."""
    since_step: int
    is_loader: bool
    """Whether most of what they take longer is waiting for their data."""

    def __str__(self) -> str:
        is_one = len(self.ranks) == 1
        who = f"rank {self.ranks[0]}" if is_one else f"ranks {', '.join(map(str, self.ranks))}"
        takes = f"take{'s' * is_one} {self.times:.1f} × the median of all"
        cause = f", waiting for {'its' if is_one else 'their'} loader" if self.is_loader else ""
        return f"{who} on {', '.join(self.nodes)} {takes}{cause}, since step {self.since_step}"


def slow_ranks(reports: Sequence[RankReport]) -> list[SlowRanks]:
    """Who makes the others wait, the slowest first. Ranks of one pipeline stage are compared with each other: stages
    need not have the same work."""
    found: list[SlowRanks] = []
    for stage in sorted({report.pp_rank for report in reports}):
        peers = [_Timed(report) for report in reports if report.pp_rank == stage]
        medians = _medians(peers)
        groups: dict[int, list[_Timed]] = {}
        for rank in peers:
            if rank.slow_windows(medians):
                groups.setdefault(rank.report.tp_group, []).append(rank)
        found.extend(_describe(group, medians) for group in groups.values())
    return sorted(found, key=lambda each: -each.times)


@dataclass(frozen=True)
class _Timed:
    """A rank with its windows, by their size and last step."""

    report: RankReport

    def windows(self) -> dict[tuple[int, int], Window]:
        return {(each.steps, each.last_step): each for each in self.report.windows if each.own_seconds is not None}

    def slow_windows(self, medians: dict[tuple[int, int], Window]) -> list[tuple[Window, Window]]:
        """The last windows, as far back as all are slow, each with the middle rank's; empty for less than a while."""
        windows, slow = self.windows(), []
        for key in sorted(medians, reverse=True):
            own, usual = windows[key].own_seconds or 0.0, medians[key].own_seconds or 0.0
            if own <= SLOW_RANK * usual:
                break
            slow.append((windows[key], medians[key]))
        return slow if len(slow) >= SUSTAINED_WINDOWS else []


def _medians(peers: Sequence[_Timed]) -> dict[tuple[int, int], Window]:
    """What the middle rank (of two the faster) has in the windows that all ranks have: in the shorter ones where that
    is in enough of them."""
    common = set.intersection(*(set(peer.windows()) for peer in peers))
    for size in WINDOW_STEPS:
        keys = [key for key in common if key[0] == size]
        if len(keys) >= SUSTAINED_WINDOWS:
            of_key = {key: [peer.windows()[key] for peer in peers] for key in keys}
            return {key: sorted(all_, key=_own)[(len(all_) - 1) // 2] for key, all_ in of_key.items()}
    return {}


def _own(window: Window) -> float:
    return window.own_seconds or 0.0


def _describe(group: Sequence[_Timed], medians: dict[tuple[int, int], Window]) -> SlowRanks:
    slow = {rank.report.rank: rank.slow_windows(medians) for rank in group}
    last, usual = max((windows[0] for windows in slow.values()), key=lambda pair: _own(pair[0]))
    first = min((windows[-1][0] for windows in slow.values()), key=lambda window: window.last_step)
    waits_longer = last.data_wait_seconds - usual.data_wait_seconds
    return SlowRanks(
        ranks=sorted(slow),
        nodes=sorted({rank.report.node for rank in group}),
        times=_own(last) / max(_own(usual), 1e-9),
        since_step=first.last_step - first.steps + 1,
        is_loader=waits_longer > (_own(last) - _own(usual)) / 2,
    )
