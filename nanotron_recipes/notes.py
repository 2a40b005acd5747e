"""What is legal in a recipe and yet worth knowing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from nanotron_recipes.errors import show_value
from nanotron_recipes.fields import keys_without_effect
from nanotron_recipes.paths import REMOTE_IN_NANOTRON, paths_of
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schedule import decay_length, decay_start, learning_rate_phases
from nanotron_recipes.skipped import SkippedBatches
from nanotron_recipes.unsupported import unsupported_features
from nanotron_recipes.urls import is_url
from nanotron_recipes.variables import how_to_set, unset_variables


def notes_on(mapping: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Return the notes on a valid recipe, the weightiest first; `mapping` is what the user wrote."""
    return [
        *unsupported_features(recipe),
        *_variables(recipe),
        *_model(recipe),
        *_recomputation(recipe),
        *_schedule(recipe),
        *_mixtures(recipe),
        *_remote_paths(recipe),
        *_staging(recipe),
        *_evaluation(recipe),
        *(f"{key}: no effect: {reason}" for key, reason in keys_without_effect(mapping)),
    ]


def _variables(recipe: Recipe) -> Iterator[str]:
    for name, key in unset_variables(recipe).items():
        yield f"variables.{name}: not set, and {key} needs it before anything is read; {how_to_set(name, recipe)}"


def _model(recipe: Recipe) -> Iterator[str]:
    architecture = recipe.model.architecture
    stated = architecture.max_position_embeddings
    if architecture.use_qk_norm and not all(architecture.rope_layers):
        yield (
            "model.model_config.use_qk_norm: no class of transformers has QK-norm together with layers without RoPE; "
            "the model can be trained but not exported (set no_rope_layer to null, or use_qk_norm to false)"
        )
    if not recipe.optimizer.accumulate_grad_in_fp32:
        yield "optimizer.accumulate_grad_in_fp32: false: no effect: gradients are summed in float32 in any case"
    lengths = {"tokens.sequence_length": recipe.tokens.sequence_length}
    for index, stage in enumerate(recipe.data_stages):
        if stage.sequence_length is not None:
            lengths[f"data_stages.{index}.sequence_length"] = stage.sequence_length
    for key, length in lengths.items():
        if length > stated:
            yield f"{key}: {length} is more than max_position_embeddings {stated}"


def _recomputation(recipe: Recipe) -> Iterator[str]:
    parallelism = recipe.parallelism
    if parallelism.recompute != "none" and parallelism.tp > 1 and parallelism.tp_linear_async_communication:
        yield (
            f"parallelism.recompute: {parallelism.recompute}: with tp_linear_async_communication matrix products run "
            "twice that otherwise would not; false costs the overlap and saves them"
        )


def _schedule(recipe: Recipe) -> Iterator[str]:
    scheduler, steps = recipe.optimizer.learning_rate_scheduler, recipe.tokens.train_steps
    key = "optimizer.learning_rate_scheduler"
    start, length = decay_start(scheduler), decay_length(recipe)
    decays = scheduler.min_decay_lr is not None and scheduler.min_decay_lr != scheduler.learning_rate
    if scheduler.lr_warmup_steps >= steps:
        yield f"{key}.lr_warmup_steps: the warm-up of {scheduler.lr_warmup_steps} steps lasts the whole run of {steps}"
    elif decays and start >= steps:
        yield f"{key}.lr_decay_starting_step: the decay after step {start} lies beyond the run of {steps} steps"
    # A start given as the number of the first decayed step, as in the published files, ends one step later.
    elif decays and start + length > steps + 1:
        yield f"{key}.lr_decay_steps: the decay ends at step {start + length}, beyond the run of {steps} steps"
    end = learning_rate_phases(recipe)[-1]
    if end.rate == 0 and end.first < steps:
        first = end.first + 1  # it trains with the rate after `end.first` steps
        which = f"step {first} trains" if first == steps else f"steps {first} to {steps} train"
        yield (
            f"{key}.lr_decay_steps: the decay ends with step {first - 1}: {which} at learning rate 0 and change "
            "nothing; a longer run wants a later or longer decay (lr_decay_starting_step, lr_decay_steps), or a "
            "min_decay_lr above 0"
        )
    skipped = SkippedBatches.of(recipe)
    for index, stage in enumerate(recipe.data_stages):
        first = skipped.step_of(stage.start_training_step)
        if first > steps:
            key = f"data_stages.{index}.start_training_step"
            yield f"{key}: stage {stage.name!r} starts at step {first}, beyond the run of {steps} steps"


def _mixtures(recipe: Recipe) -> Iterator[str]:
    for index, stage in enumerate(recipe.data_stages):
        total = math.fsum(stage.data.dataset.dataset_weights or [1.0])
        if not math.isclose(total, 1, abs_tol=1e-6):
            yield f"data_stages.{index}.data.dataset.dataset_weights: normalised; they sum to {total:.6g}, not 1"


def _remote_paths(recipe: Recipe) -> Iterator[str]:
    """One line for all URLs under a key; `checks` has let them pass."""
    for name in REMOTE_IN_NANOTRON:
        remote = [(key, path) for key, path in paths_of(recipe, name) if is_url(path)]
        if remote:
            more = f" (and {len(remote) - 1} more)" if len(remote) > 1 else ""
            key, path = remote[0]
            yield f"{key}: {show_value(path)}{more}: nothing is read from a URL so far; pretrain needs a folder here"


def _staging(recipe: Recipe) -> Iterator[str]:
    """What has to be brought to this machine, in a line, and what has no place here, in another."""
    first_key: dict[str, str] = {}
    placed: set[str] = set()
    for index, stage in enumerate(recipe.data_stages):
        dataset = stage.data.dataset
        for number, folder in enumerate(dataset.dataset_folder):
            if is_url(folder):
                first_key.setdefault(folder, f"data_stages.{index}.data.dataset.dataset_folder.{number}")
        if dataset.dataset_read_path is not None or recipe.data_staging.path is not None:
            placed.update(dataset.dataset_folder)
    for has_place, what in (
        (True, "read from a copy on this machine, which `data stage` makes, or pretrain before the run"),
        (False, "expected a dataset_read_path, or data_staging.path, for its copy on this machine"),
    ):
        found = [folder for folder in first_key if (folder in placed) is has_place]
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            yield f"{first_key[found[0]]}: {show_value(found[0])}{more}: {what}"


def _evaluation(recipe: Recipe) -> Iterator[str]:
    evaluation = recipe.lighteval
    if evaluation is None:
        return
    interval, saved = evaluation.eval_interval, recipe.checkpoints.checkpoint_interval
    if interval is not None and interval % saved and recipe.checkpoints.checkpoint_interval_minutes is None:
        yield (
            f"lighteval.eval_interval: {interval} is no multiple of checkpoints.checkpoint_interval {saved}: the first "
            "checkpoint from each multiple on is evaluated"
        )
    if evaluation.tasks is not None and evaluation.tasks.tasks:
        yield (
            "lighteval.tasks.tasks: run where the training is a Slurm job, and by hand with `evaluate --benchmarks`; "
            "lighteval needs an environment of its own (make eval-env) and the network"
        )
