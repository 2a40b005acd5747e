"""On resume the past is frozen: which changes to a recipe would have altered steps already taken.

A run may go on with another recipe where both describe the same steps 1 to t: the same model, batch, optimizer,
learning rates and mixtures. What only concerns later steps may change (the point of a stable learning rate that can
decay at any time), and where and how fast the training runs may change freely. That the shards hold the same tokens is
told by their fingerprint, not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from typing import Any

from nanotron_recipes.errors import show_value
from nanotron_recipes.fields import Key, keys_of
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schedule import same_learning_rates
from nanotron_recipes.schema.data import DataStage
from nanotron_recipes.schema.section import Section
from nanotron_recipes.sequences import block_length, contiguous_length
from nanotron_recipes.skipped import SkippedBatches
from nanotron_recipes.topology import global_batch_size

_SCHEDULE = "optimizer.learning_rate_scheduler"
_STEPS = "tokens.train_steps"
_BATCH = "tokens.global_batch_size"
_BLOCK, _CONTIGUOUS = "tokens.block_length", "tokens.contiguous_length"
_STAGES = "data_stages"
_SKIPPED = "data_skipped_ranges"
_WEIGHTS = "data.dataset.dataset_weights"

_FREE = (
    # Where, how fast, how observed.
    "parallelism",
    "checkpoints",
    "s3_upload",
    "guards",
    "lighteval",
    "logging",
    "profiler",
    "slurm",
    "variables",
    "data_staging",
    "general.project",
    "general.purpose",
    "general.cpu_ranks_per_node",
    "general.replica_check_interval",
    "general.deterministic",
    "optimizer.zero_stage",
    "optimizer.optimizer_factory.torch_adam_is_fused",
    "model.ddp_bucket_cap_mb",
    "model.model_config._attn_implementation",
    "tokens.val_check_interval",
    "tokens.limit_val_batches",
    # Does nothing: gradients are summed in float32 in any case.
    "optimizer.accumulate_grad_in_fp32",
    # How the batch is cut; its size is compared as such.
    "tokens.micro_batch_size",
    "tokens.batch_accumulation_per_replica",
    _BATCH,
    # Null stands for a value that is compared as such.
    _BLOCK,
    _CONTIGUOUS,
    # What the shards' fingerprint covers, and what only an export states.
    "corpus",
    "tokenizer",
    "model.model_config.max_position_embeddings",
    "model.model_config.bos_token_id",
    "model.model_config.eos_token_id",
    "model.model_config.pad_token_id",
)
_STAGE_FREE = (
    "name",
    "data.num_loading_workers",
    "data.dataset.dataset_folder",
    "data.dataset.dataset_read_path",
    "data.dataset.vocab_size",
    "data.dataset.token_size_in_bytes",
    "data.dataset.tokenizer_name",
)
"""Of a stage: its name is a label, workers only read ahead, its folders may have moved (their number shows in the
weights), and the rest is only compared with the shards."""


@dataclass(frozen=True)
class Change:
    """A key with its value in the run so far and in the new recipe."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {show_value(self.old)} → {show_value(self.new)}"


def changes_of_the_past(old: Recipe, new: Recipe, step: int) -> list[Change]:
    """Return the differences that would have altered a step up to and including `step`; none means it may resume."""
    elsewhere = (*_FREE, _SCHEDULE, _STEPS, _STAGES, _SKIPPED)
    changes = [change for change in _changes(old, new) if not _is_under(change.key, elsewhere)]
    if global_batch_size(old) != global_batch_size(new):
        changes.append(Change(_BATCH, global_batch_size(old), global_batch_size(new)))
    if step and old.tokens.sequence_length == new.tokens.sequence_length:  # otherwise that is what changed
        for key, value in ((_BLOCK, block_length), (_CONTIGUOUS, contiguous_length)):
            if value(old) != value(new):
                changes.append(Change(key, value(old), value(new)))
    batch = SkippedBatches.of(old).batch_of(step)
    past_data = [change for change, first in _data_changes(old, new) if first <= batch]
    return [*changes, *_past_schedule_changes(old, new, step), *past_data]


def later_changes(old: Recipe, new: Recipe, step: int) -> list[Change]:
    """Return the differences in schedule, data and length of the run that only alter steps after `step`."""
    past = {change.key for change in _past_schedule_changes(old, new, step)}
    schedule = [change for change in _schedule_changes(old, new) if change.key not in past]
    batch = SkippedBatches.of(old).batch_of(step)
    return [*schedule, *(change for change, first in _data_changes(old, new) if first > batch)]


def _schedule_changes(old: Recipe, new: Recipe) -> list[Change]:
    return [change for change in _changes(old, new) if _is_under(change.key, (_SCHEDULE, _STEPS))]


def _past_schedule_changes(old: Recipe, new: Recipe, step: int) -> list[Change]:
    """Return the keys that alone alter a learning rate up to `step`, or all that differ where only together they do."""
    if same_learning_rates(old, new, step):
        return []
    changes = _schedule_changes(old, new)
    return [change for change in changes if not same_learning_rates(old, _with(old, change), step)] or changes


def _with(recipe: Recipe, change: Change) -> Recipe:
    """Return the recipe with one key of the schedule, or the number of steps, changed."""
    name = change.key.rpartition(".")[2]
    if change.key == _STEPS:
        return recipe.model_copy(update={"tokens": recipe.tokens.model_copy(update={name: change.new})})
    scheduler = recipe.optimizer.learning_rate_scheduler.model_copy(update={name: change.new})
    optimizer = recipe.optimizer.model_copy(update={"learning_rate_scheduler": scheduler})
    return recipe.model_copy(update={"optimizer": optimizer})


def _data_changes(old: Recipe, new: Recipe) -> Iterator[tuple[Change, int]]:
    """Yield each difference between what is read, with the first batch that it concerns."""
    yield from _stage_changes(old, new)
    before, after = SkippedBatches.of(old), SkippedBatches.of(new)
    first = before.first_difference(after)
    if first is not None:
        yield Change(_SKIPPED, str(before), str(after)), first


def _stage_changes(old: Recipe, new: Recipe) -> Iterator[tuple[Change, int]]:
    """Yield each difference between the stages, with the first batch of which either recipe says that it is in it."""
    for index, (before, after) in enumerate(zip_longest(old.data_stages, new.data_stages)):
        key = f"{_STAGES}.{index}"
        if before is None or after is None:
            there = before or after
            yield Change(key, _summary(before), _summary(after)), there.start_training_step
            continue
        first = min(before.start_training_step, after.start_training_step)
        for name, was, now in _differences(_stage_values(old, before), _stage_values(new, after)):
            if name != _WEIGHTS or _shares(was) != _shares(now):
                yield Change(f"{key}.{name}", was, now), first


def _stage_values(recipe: Recipe, stage: DataStage) -> dict[str, Any]:
    values = {key: value for key, value in _flatten(stage, "") if not _is_under(key, _STAGE_FREE)}
    if stage.data.dataset.dataset_weights is None:
        values[_WEIGHTS] = [1.0] * len(stage.data.dataset.dataset_folder)
    if stage.sequence_length == recipe.tokens.sequence_length:
        values["sequence_length"] = None
    return values


def _shares(weights: list[float]) -> list[Fraction]:
    """What a mixture makes of its weights, which need not sum to 1: exact, of the decimals that they are written as."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def _summary(stage: DataStage | None) -> str | None:
    return f"{stage.name} from step {stage.start_training_step}" if stage else None


def _changes(old: Recipe, new: Recipe) -> list[Change]:
    """Return every key with an effect that differs; of a list of sections each entry's keys."""
    return [Change(*difference) for difference in _differences(dict(_flatten(old, "")), dict(_flatten(new, "")))]


def _flatten(section: Section, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, key in keys_of(type(section)).items():
        if key.no_effect is None:
            yield from _flatten_value(key, getattr(section, key.attribute), f"{prefix}{name}")


def _flatten_value(key: Key, value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Section):
        yield from _flatten(value, f"{path}.")
    elif key.repeated and value:
        for index, entry in enumerate(value):
            yield from _flatten(entry, f"{path}.{index}.")
    else:
        yield path, value


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _is_under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
