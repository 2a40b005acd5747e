"""What happens at a step, as pure functions of the recipe and the step.

The learning rate has nanotron's semantics: a schedule λ of the optimizer steps already taken, so that step N (counted
from 1) trains with, and records, λ(N − 1). A linear warm-up therefore begins with a step at rate 0, and reaches the
peak after `lr_warmup_steps` steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.data import DataStage
from nanotron_recipes.schema.optimizer import LearningRateScheduler
from nanotron_recipes.skipped import SkippedBatches

Shape = Literal["constant", "warm-up", "linear", "cosine", "1-sqrt"]


@dataclass(frozen=True)
class Phase:
    """A stretch of the learning rate over the indices (steps taken) `first` ≤ i < `end`; `end` None is for ever."""

    shape: Shape
    first: int
    end: int | None
    origin: int
    """Index at which the shape's own progress is 0."""
    length: int
    """Indices over which the shape goes from one rate to the other."""
    rate: float
    """Rate at the start; of a warm-up, at its end."""
    floor: float
    """Rate at the end; of a warm-up, at its start."""

    def rate_at(self, index: int) -> float:
        """Return the learning rate after `index` steps."""
        done, span = index - self.origin, self.rate - self.floor
        match self.shape:
            case "constant":
                return self.rate
            case "warm-up":
                return self.rate * done / self.length
            case "linear":
                return self.floor + span * (self.length - done) / self.length
            case "cosine":
                return self.floor + span * (1 + math.cos(math.pi * done / self.length)) / 2
            case "1-sqrt":
                return self.floor + span * (1 - math.sqrt(done / self.length))


def learning_rate_phases(recipe: Recipe) -> list[Phase]:
    """Return the phases of the whole run in order, without gaps; the last one has no end.

    Null keys mean what nanotron 0.4's Config makes of them: the decay starts after the warm-up and lasts
    train_steps − lr_warmup_steps, and the minimum is the peak.
    """
    scheduler = recipe.optimizer.learning_rate_scheduler
    warmup, peak = scheduler.lr_warmup_steps, scheduler.learning_rate
    floor = peak if scheduler.min_decay_lr is None else scheduler.min_decay_lr
    start = decay_start(scheduler)
    length = decay_length(recipe)
    if warmup == 0 and length == 0:
        return [_constant(peak, 0, None)]
    phases = [_warm_up(scheduler)]
    # nanotron counts index `warmup` to the warm-up, whose last rate is the peak.
    cursor = warmup + 1
    if start > cursor:
        phases.append(_constant(peak, cursor, start))
        cursor = start
    if start + length > cursor:
        phases.append(Phase(scheduler.lr_decay_style, cursor, start + length, start, length, peak, floor))
        cursor = start + length
    return [*phases, _constant(floor, cursor, None)]


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """Return the learning rate that step `step` (from 1) trains with and records.

    Computed as nanotron and torch do, as a factor of the peak times the peak, to the same last bit.
    """
    peak = recipe.optimizer.learning_rate_scheduler.learning_rate
    return peak * (_phase_at(learning_rate_phases(recipe), step - 1).rate_at(step - 1) / peak)


def same_learning_rates(one: Recipe, other: Recipe, steps: int) -> bool:
    """Return whether two recipes train steps 1 to `steps` at the same rates, whatever they say about later ones."""
    ours, theirs = learning_rate_phases(one), learning_rate_phases(other)
    borders = {phase.first for phase in (*ours, *theirs) if phase.first < steps}
    for first, end in pairwise(sorted({*borders, steps})):
        mine, yours = _phase_at(ours, first), _phase_at(theirs, first)
        if replace(mine, first=0, end=None) == replace(yours, first=0, end=None):
            continue
        if any(mine.rate_at(index) != yours.rate_at(index) for index in range(first, end)):
            return False
    return True


def decay_start(scheduler: LearningRateScheduler) -> int:
    """Return the number of steps before the decay."""
    start = scheduler.lr_decay_starting_step
    return scheduler.lr_warmup_steps if start is None else start


def decay_length(recipe: Recipe) -> int:
    """Return the number of steps of the decay; a run shorter than its warm-up has none."""
    scheduler = recipe.optimizer.learning_rate_scheduler
    if scheduler.lr_decay_steps is not None:
        return scheduler.lr_decay_steps
    return max(0, recipe.tokens.train_steps - scheduler.lr_warmup_steps)


def stage_at(recipe: Recipe, step: int) -> tuple[int, DataStage]:
    """Return the index and the data stage that step `step` (from 1) reads. The recipe must have stages."""
    batch = SkippedBatches.of(recipe).batch_of(step)
    index = max(i for i, stage in enumerate(recipe.data_stages) if stage.start_training_step <= batch)
    return index, recipe.data_stages[index]


def stage_boundaries(recipe: Recipe) -> list[tuple[int, int]]:
    """Return for each data stage its first step and the step after its last, within train_steps.

    Stages follow the batches that are read: skipped ones bring the next stage forward. The learning rate does not.
    """
    end, skipped = recipe.tokens.train_steps + 1, SkippedBatches.of(recipe)
    starts = [min(skipped.step_of(stage.start_training_step), end) for stage in recipe.data_stages]
    return list(zip(starts, [*starts[1:], end], strict=False))


def _phase_at(phases: list[Phase], index: int) -> Phase:
    return next(phase for phase in phases if phase.end is None or index < phase.end)


def _warm_up(scheduler: LearningRateScheduler) -> Phase:
    steps, peak = scheduler.lr_warmup_steps, scheduler.learning_rate
    if scheduler.lr_warmup_style == "constant":
        return _constant(peak, 0, steps + 1)
    return Phase("warm-up", 0, steps + 1, 0, max(steps, 1), peak, 0.0)


def _constant(rate: float, first: int, end: int | None) -> Phase:
    return Phase("constant", first, end, 0, 1, rate, rate)
