"""What a run's own records tell about it, as facts for the model card."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import isfinite, log
from pathlib import Path
from typing import Any

from data.manifest import read_manifest
from launch.train.metrics import read_metrics
from launch.train.run_folder import RunFolder
from model.model_card import ArithmeticFact, ModelCardFacts, ValidationFact, facts_from_recipe
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe


def facts_of_run(run: RunFolder, recipe: Recipe, step: int, name: str | None = None) -> ModelCardFacts:
    """The facts after `step` steps of a run; what its metrics.jsonl does not hold is left out.

    Read are the last "validation" event and the "evaluation" events of that step. Of the latter's keys, all optional,
    the last count: `bigram_bits_per_byte` {source: figure} and `arithmetic` {"correct": n, "total": n}. `name`: what
    the card calls the model (default: the run's name).
    """
    facts = facts_from_recipe(recipe, name=name or run.name, step=step, recipe_name=run.header().recipe or None)
    events = read_metrics(run.metrics_file).events if run.metrics_file.is_file() else []
    losses = _figures(_last(events, "validation", step).get("validation_loss"))
    evaluation = _all(events, "evaluation", step)
    bigram = _figures(evaluation.get("bigram_bits_per_byte"))
    return replace(
        facts,
        validation=tuple(
            ValidationFact(source, loss, bits_per_byte(loss, source, recipe), bigram.get(source))
            for source, loss in losses.items()
        ),
        arithmetic=_arithmetic(evaluation.get("arithmetic")),
    )


def _figures(value: object) -> dict[str, float]:
    """The finite numbers in a record's {source: figure}; a damaged or foreign record has none."""
    if not isinstance(value, dict):
        return {}
    return {name: float(number) for name, number in value.items() if type(number) in (int, float) and isfinite(number)}


def _arithmetic(value: object) -> ArithmeticFact | None:
    if not isinstance(value, dict):
        return None
    correct, total = value.get("correct"), value.get("total")
    if type(correct) is not int or type(total) is not int or not 0 <= correct <= total or total == 0:
        return None
    return ArithmeticFact(correct, total)


def _last(events: Iterable[dict[str, Any]], kind: str, step: int) -> dict[str, Any]:
    matching = [event for event in events if event["event"] == kind and event.get("step") == step]
    return matching[-1] if matching else {}


def _all(events: Iterable[dict[str, Any]], kind: str, step: int) -> dict[str, Any]:
    """All keys of the events of a step."""
    matching = [event for event in events if event["event"] == kind and event.get("step") == step]
    return {key: value for event in matching for key, value in event.items()}


def bits_per_byte(nats_per_token: float, source: str, recipe: Recipe) -> float | None:
    """Bits per byte of a source's held-out text; None where its manifest is not at hand or counts no bytes."""
    for folder in _folders(source, recipe):
        try:
            ratio = read_manifest(folder).validation.bytes_per_token
        except UserError:
            continue
        return nats_per_token / log(2) / ratio if ratio else None
    return None


def _folders(source: str, recipe: Recipe) -> list[Path]:
    """Where a source's shards may lie: in the recipe's corpus, or in a data folder that is named like it."""
    named = {
        folder
        for stage in recipe.data_stages
        for folder in stage.data.dataset.dataset_folder
        if source in (folder, Path(folder).name)
    }
    in_corpus = [Path(recipe.corpus.path) / source] if recipe.corpus else []
    return in_corpus + sorted(map(Path, named))
