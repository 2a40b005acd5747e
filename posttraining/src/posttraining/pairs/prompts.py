"""The prompts of a preference set: deduplicated, and some of them kept apart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from posttraining.datasets import from_rows, load_data
from posttraining.errors import mistake
from posttraining.pairs.settings import PairsSettings
from posttraining.tasks import arithmetic


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    turns: list[dict[str, Any]]
    """The conversation to answer."""
    answer: str | None
    """What is right, where the data say so."""
    held_out: bool
    """Whether its pair is for evaluation only."""


def load_prompts(settings: PairsSettings, file: str) -> tuple[list[Prompt], int]:
    """Every prompt once, those kept apart last, and how many repetitions were dropped. Raises Mistake."""
    rows = list(load_data(settings.data, "prompts", file))
    apart: list[dict[str, Any]] = []
    if settings.data.generated and settings.held_out_prompts:
        apart = list(from_rows(arithmetic.prompts(settings.data.seed, settings.held_out_prompts, "held_out")))
    elif settings.held_out_prompts:
        if settings.held_out_prompts >= len(rows):
            expected = f"expected fewer than the {len(rows)} rows"
            raise mistake(file, "held_out_prompts", settings.held_out_prompts, expected)
        rows, apart = rows[: -settings.held_out_prompts], rows[-settings.held_out_prompts :]
    seen: set[str] = set()
    prompts = []
    # What is kept apart comes first here, so that a repetition in the training rows is what is dropped.
    for row, held_out in [(row, True) for row in apart] + [(row, False) for row in rows]:
        turns = _turns(row["prompt"])
        key = normalized(turns)
        if key not in seen:
            seen.add(key)
            answer = row.get("answer")
            prompts.append(Prompt(turns, None if answer is None else str(answer), held_out))
    prompts.sort(key=lambda prompt: prompt.held_out)
    return prompts, len(rows) + len(apart) - len(prompts)


def normalized(turns: list[dict[str, Any]]) -> str:
    """A key that is equal for prompts with the same words: case, spaces and line breaks do not count."""
    return json.dumps([[turn["role"], " ".join(str(turn.get("content")).lower().split())] for turn in turns])


def _turns(prompt: Any) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    # A data set stores every message with the keys of all of them.
    return [{key: value for key, value in turn.items() if value is not None} for turn in prompt]
