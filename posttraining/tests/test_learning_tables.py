"""The tables of benchmarks/learning.py on answers that are made up: pooling, errors, and what counts as reached."""

from __future__ import annotations

from pathlib import Path

import pytest
from learning_tables import PLAIN, Chain, pooled, rise, shortening, tables

from posttraining.evaluate.results import answers_file, read_results, write_answers, write_results
from posttraining.evaluate.scoring import Estimate, Score

PROBLEMS = 40
RIGHT = {"base": 0, "sft": 24, "apo": 25, "dpo": 22, "grpo": 35, "grpo-no-penalty": 36, "merge": 35}
TOKENS = {"base": 90, "sft": 50, "apo": 50, "dpo": 50, "grpo": 35, "grpo-no-penalty": 60, "merge": 36}


def chain(folder: Path, seed: int, right: dict[str, int] = RIGHT) -> Chain:
    """A model's first answers are right, as many as it says; every other answer is three tokens longer."""
    asked = {model: ["greedy", "sampled", *(PLAIN.values() if model == "base" else ())] for model in right}
    for model, tasks in asked.items():
        for task in tasks:
            count = 5 if task in PLAIN.values() else right[model]
            scores = [
                Score(number, number < count, model != "base", TOKENS[model] + 3 * (number % 2), True)
                for number in range(PROBLEMS)
            ]
            write_answers(answers_file(folder, model, task), scores, ["…"] * PROBLEMS)
    write_results(folder, asked, {}, {})
    margin = {"mean": 0.5, "error": 0.1}
    found = {"pairs": 9, "before": margin, "after": margin, "gain": margin, "ranked_before": 1.0, "ranked_after": 1.0}
    return Chain(seed, read_results(folder), {"apo": found, "dpo": found})


def test_pooling_is_the_mean_with_the_error_of_a_mean() -> None:
    assert pooled([Estimate(1.0, 0.3), Estimate(3.0, 0.4)]) == Estimate(2.0, 0.25)


def test_gains_are_paired(tmp_path: Path) -> None:
    gained = rise([chain(tmp_path, 1)], "apo", "grpo", "sampled", "right")
    share = 10 / PROBLEMS
    assert gained.mean == pytest.approx(share)
    assert gained.error == pytest.approx((share * (1 - share) / (PROBLEMS - 1)) ** 0.5)
    assert rise([chain(tmp_path, 1)], "base plain", "sft", "greedy", "right").mean == pytest.approx(19 / PROBLEMS)


def test_length_is_relative(tmp_path: Path) -> None:
    assert shortening([chain(tmp_path, 1)], "apo", "grpo").mean == pytest.approx(36.5 / 51.5 - 1)


def test_what_was_reached_is_said(tmp_path: Path) -> None:
    good = chain(tmp_path / "good", 1)
    sections = tables([good, good], PROBLEMS, 3)
    assert [row[3] for row in sections[0].rows] == ["yes"] * len(sections[0].rows)
    bad = chain(tmp_path / "bad", 1, {**RIGHT, "apo": 20, "grpo": 20})
    missed = {row[0] for row in tables([bad], PROBLEMS, 3)[0].rows if row[3] == "no"}
    assert missed == {"APO: greedy accuracy", "APO: sampled accuracy", "GRPO: sampled accuracy"}
    assert [section.title for section in sections[-4:]] == [
        "Seed 1: 40 held-out problems",
        "Seed 1: gains",
        "Seed 1: 40 held-out problems",
        "Seed 1: gains",
    ]
