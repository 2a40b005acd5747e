"""What is measured of an exported model without any network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.arithmetic import held_out_problems
from data.plan import DataPlan
from launch.evaluate.arithmetic_task import arithmetic_accuracy
from launch.evaluate.finish import NUM_PROBLEMS, has_arithmetic
from launch.evaluate.generation import Generator
from launch.evaluate.source_loss import source_losses
from launch.train.run_tokenizer import run_tokenizer
from nanotron_recipes.errors import UserError, nearest_name, user_error
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.services import OFFLINE_TASKS, OfflineTask

BATCH_SIZE = 8


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        recipe: whose held-out text the losses are of; None: not known, and no loss is measured.
        tasks: those that do not fit the recipe are left out.
        batch_size: sequences at a time.
        device: cpu or cuda.
    """

    recipe: Recipe | None
    tasks: tuple[OfflineTask, ...]
    batch_size: int = BATCH_SIZE
    device: str = "cpu"


@dataclass(frozen=True)
class Results:
    """What was measured.

    Attributes:
        source_loss: nats per token by source.
        arithmetic: {"correct", "total"}; empty where it was not asked for.
        left_out: tasks that were asked for and do not fit, each with its reason.
        benchmarks: what lighteval measured, by task and metric.
        error: why the benchmarks could not be run; empty where they were, or were not asked for.
    """

    source_loss: dict[str, float] = field(default_factory=dict)
    arithmetic: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    benchmarks: dict[str, dict[str, float]] = field(default_factory=dict)
    error: str = ""

    def __bool__(self) -> bool:
        """Whether anything was measured, or failed."""
        return any((self.source_loss, self.arithmetic, self.benchmarks, self.error))

    def event(self, step: int) -> dict[str, Any]:
        """The record of the evaluation, for metrics.jsonl."""
        found = {
            "source_loss": self.source_loss,
            "arithmetic": self.arithmetic,
            "benchmarks": self.benchmarks,
            "error": self.error,
        }
        return {"event": "evaluation", "step": step, **{name: value for name, value in found.items() if value}}


def evaluate_export(export: Path, request: Request) -> Results:
    """Measure an exported folder. Raises UserError where the recipe's data is not at hand."""
    from model.hf_folder import load_with_transformers

    check_device(request.device)
    losses: dict[str, float] = {}
    arithmetic: dict[str, int] = {}
    left_out: dict[str, str] = {}
    recipe = request.recipe
    if "loss" in request.tasks:
        if recipe is None or not recipe.data_stages:
            left_out["loss"] = "no recipe is known whose text it could be measured on"
        elif is_another_tokenizer(export, recipe):
            left_out["loss"] = "the shards here were made with another tokenizer than the model's"
        else:
            plan = DataPlan.from_recipe(recipe)
            model = load_with_transformers(export, "auto").to(request.device)
            losses = source_losses(model, plan, recipe, request.batch_size)
            del model  # the generator has one of its own
            if not losses:
                left_out["loss"] = "nothing is held out of any source"
    if "arithmetic" in request.tasks:
        if recipe is not None and not has_arithmetic(recipe):
            left_out["arithmetic"] = "the recipe trains on no generated sums"
        elif not (export / "tokenizer.json").is_file():
            left_out["arithmetic"] = "the tokenizer is not at hand"
        else:
            result = arithmetic_accuracy(
                Generator(export, request.device), held_out_problems(NUM_PROBLEMS, seed=0), request.batch_size * 25
            )
            arithmetic = {"correct": result.correct, "total": result.total}
    return Results(losses, arithmetic, left_out)


def is_another_tokenizer(export: Path, recipe: Recipe) -> bool:
    """Whether the tokenizer that the recipe's shards are made with has other tokens than that of an exported folder, as
    far as both are at hand. Other programs write the same tokenizer otherwise."""
    ours, theirs = export / "tokenizer.json", run_tokenizer(None, recipe)
    if theirs is None or not ours.is_file():
        return False
    texts = [ours.read_bytes(), (theirs / "tokenizer.json").read_bytes()]
    if texts[0] == texts[1]:
        return False
    from tokenizers import Tokenizer

    first, second = (Tokenizer.from_buffer(text).get_vocab(with_added_tokens=False) for text in texts)
    return first != second


def check_device(device: str) -> None:
    """Raise UserError where PyTorch cannot compute on a device here."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None


def tasks_named(text: str) -> tuple[OfflineTask, ...]:
    """The tasks in `loss,arithmetic`. Raises UserError with the nearest name."""
    found = [name.strip() for name in text.split(",")]
    for name in found:
        if name not in OFFLINE_TASKS:
            expected = f"expected some of {', '.join(OFFLINE_TASKS)}"
            raise user_error(expected, source="--tasks", value=name, nearest=nearest_name(name, OFFLINE_TASKS))
    return tuple(task for task in OFFLINE_TASKS if task in found)
