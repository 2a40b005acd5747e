"""The learning rate is nanotron's, at every step."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schedule import (
    learning_rate_at,
    learning_rate_phases,
    same_learning_rates,
    stage_at,
    stage_boundaries,
)

TINY = load_recipe("tiny").recipe


def with_schedule(train_steps: int, **schedule: Any) -> Recipe:
    """A recipe with this schedule and nanotron's nulls for the rest."""
    absent = dict.fromkeys(("lr_decay_starting_step", "lr_decay_steps", "min_decay_lr"))
    scheduler = TINY.optimizer.learning_rate_scheduler.model_copy(update={**absent, **schedule})
    optimizer = TINY.optimizer.model_copy(update={"learning_rate_scheduler": scheduler})
    return TINY.model_copy(
        update={"optimizer": optimizer, "tokens": TINY.tokens.model_copy(update={"train_steps": train_steps})}
    )


def rates(recipe: Recipe, steps: int) -> list[float]:
    return [learning_rate_at(recipe, step) for step in range(1, steps + 1)]


FIELDS = {
    "learning_rate": st.floats(1e-6, 10.0),
    "lr_warmup_steps": st.integers(0, 40),
    "lr_warmup_style": st.sampled_from(["linear", "constant"]),
    "lr_decay_style": st.sampled_from(["linear", "cosine"]),
    "lr_decay_starting_step": st.none() | st.integers(0, 60),
    "lr_decay_steps": st.none() | st.integers(0, 60),
    "min_decay_lr": st.none() | st.floats(0.0, 1.0),
}
schedules = st.fixed_dictionaries(FIELDS)


def wheel_rates(train_steps: int, schedule: dict[str, Any]) -> list[float]:
    """What nanotron's scheduler sets on a real optimizer, before each step."""
    import torch

    from parallel.nanotron_import import import_nanotron

    import_nanotron()
    from nanotron.config.config import LRSchedulerArgs
    from nanotron.helpers import lr_scheduler_builder

    arguments = LRSchedulerArgs(**schedule)
    if arguments.lr_decay_steps is None:  # as nanotron's Config does
        arguments.lr_decay_steps = train_steps - arguments.lr_warmup_steps
    adam = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)

    class Optimizer:
        @staticmethod
        def get_base_optimizer() -> torch.optim.Optimizer:
            return adam

    scheduler = lr_scheduler_builder(Optimizer(), arguments, total_training_steps=train_steps)
    found = []
    for _ in range(train_steps + 20):
        found.append(adam.param_groups[0]["lr"])
        adam.step()
        scheduler.step()
    return found


@settings(deadline=None, max_examples=60)
@given(schedule=schedules, train_steps=st.integers(1, 120))
def test_linear_and_cosine_are_the_wheels_bit_by_bit(schedule: dict[str, Any], train_steps: int) -> None:
    recipe = with_schedule(train_steps, **schedule)
    if schedule["lr_warmup_steps"] == 0 and schedule["lr_decay_steps"] == 0:
        # The wheel returns the rate where it should return a factor.
        assert rates(recipe, 5) == [schedule["learning_rate"]] * 5
        return
    assert rates(recipe, train_steps + 20) == wheel_rates(train_steps, schedule)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_the_shipped_tiny_schedule_is_the_wheels(style: str) -> None:
    schedule = {**TINY.optimizer.learning_rate_scheduler.model_dump(), "lr_decay_style": style}
    assert rates(with_schedule(1100, **schedule), 1120) == wheel_rates(1100, schedule)


@settings(deadline=None)
@given(start=st.integers(3, 50), length=st.integers(1, 50), floor=st.floats(0, 1e-3))
def test_one_minus_sqrt_follows_its_formula(start: int, length: int, floor: float) -> None:
    peak = 1e-2
    recipe = with_schedule(
        100,
        learning_rate=peak,
        lr_warmup_steps=2,
        lr_decay_style="1-sqrt",
        lr_decay_starting_step=start,
        lr_decay_steps=length,
        min_decay_lr=floor,
    )
    for taken in range(start, start + length):
        expected = floor + (peak - floor) * (1 - math.sqrt((taken - start) / length))
        assert learning_rate_at(recipe, taken + 1) == pytest.approx(expected, rel=1e-14)
    assert learning_rate_at(recipe, start) == peak
    assert learning_rate_at(recipe, start + length + 1) == pytest.approx(floor, rel=1e-14)


def test_step_n_trains_with_the_rate_after_n_minus_1_steps() -> None:
    assert learning_rate_at(TINY, 1) == 0.0
    assert learning_rate_at(TINY, 23) == pytest.approx(0.5e-2)
    assert learning_rate_at(TINY, 45) == learning_rate_at(TINY, 793) == 1e-2
    assert learning_rate_at(TINY, 794) < 1e-2
    assert learning_rate_at(TINY, 1101) == 0.0


def test_nulls_mean_what_nanotron_makes_of_them() -> None:
    recipe = with_schedule(10, learning_rate=1.0, lr_warmup_steps=2, lr_decay_style="linear", min_decay_lr=0.0)
    assert rates(recipe, 11) == [0.0, 0.5, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0]
    assert set(rates(with_schedule(10, learning_rate=1.0, lr_warmup_steps=0, lr_warmup_style="constant"), 12)) == {1.0}


@settings(deadline=None)
@given(schedule=schedules, train_steps=st.integers(1, 120))
def test_phases_join_without_gaps(schedule: dict[str, Any], train_steps: int) -> None:
    phases = learning_rate_phases(with_schedule(train_steps, **schedule))
    assert phases[0].first == 0 and phases[-1].end is None
    assert all(before.end == after.first for before, after in pairwise(phases))


@settings(deadline=None)
@given(first=schedules, second=schedules, kept=st.sets(st.sampled_from(sorted(FIELDS))), steps=st.integers(0, 130))
def test_the_past_is_the_same_exactly_where_every_rate_is(
    first: dict[str, Any], second: dict[str, Any], kept: set[str], steps: int
) -> None:
    second = {**second, **{name: first[name] for name in (*kept, "learning_rate")}}
    one, other = with_schedule(100, **first), with_schedule(100, **second)
    assert same_learning_rates(one, other, steps) == (rates(one, steps) == rates(other, steps))


def test_each_step_has_the_stage_that_began_last() -> None:
    assert [stage_at(TINY, step)[0] for step in (1, 550, 551, 792, 793, 1100)] == [0, 0, 1, 1, 2, 2]
    assert stage_boundaries(TINY) == [(1, 551), (551, 793), (793, 1101)]


def test_stages_beyond_the_run_are_empty_and_noted() -> None:
    loaded = load_recipe("tiny", ["tokens.train_steps=600"])
    assert stage_boundaries(loaded.recipe) == [(1, 551), (551, 601), (601, 601)]
    assert sum("beyond the run of 600 steps" in note for note in loaded.notes) == 2


def test_a_decay_cut_off_by_the_end_is_noted() -> None:
    assert any("decay ends at step 1100" in note for note in load_recipe("tiny", ["tokens.train_steps=1000"]).notes)
    assert any("lasts the whole run" in note for note in load_recipe("tiny", ["tokens.train_steps=40"]).notes)


def test_steps_that_change_nothing_are_noted() -> None:
    """A run that is complete and is asked for more steps has had its decay."""
    scheduler = "optimizer.learning_rate_scheduler"
    for asked, said in (
        (["tokens.train_steps=1101"], "step 1101 trains at learning rate 0"),
        (["tokens.train_steps=1200"], "steps 1101 to 1200 train at learning rate 0"),
        (["tokens.train_steps=1200", f"{scheduler}.min_decay_lr=1e-5"], ""),
        (["tokens.train_steps=1200", f"{scheduler}.lr_decay_steps=null"], ""),
        ([], ""),
    ):
        loaded = load_recipe("tiny", asked)
        notes = [note for note in loaded.notes if "at learning rate 0" in note]
        assert [said in note for note in notes] == ([True] if said else [])
        zeros = [s for s in range(2, loaded.recipe.tokens.train_steps + 1) if learning_rate_at(loaded.recipe, s) == 0]
        assert zeros == (list(range(1101, loaded.recipe.tokens.train_steps + 1)) if said else [])
