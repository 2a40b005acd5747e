"""What must hold between the keys of the model, its optimizer and how it is split."""

from __future__ import annotations

import math
from collections.abc import Iterator

import regex

from nanotron_recipes.parameters import matches, parameter_names
from nanotron_recipes.problem import Problem
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import stage_sequence_length
from nanotron_recipes.topology import MAX_SIZE, divisors, next_multiple, padded_vocab_size

MAX_LAYERS = 10_000
"""Decoder layers that a recipe may ask for."""
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("make_vocab_size_divisible_by", "sequence_length", "global_batch_size", "micro_batch_size"),
    *("block_length", "contiguous_length"),
    *("batch_accumulation_per_replica", "dp", "pp", "tp", "context_parallel_size", "expert_parallel_size"),
)


def model_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what cannot be, most basic first."""
    yield from _sizes(recipe)
    yield from _shape(recipe)
    yield from _tensor_parallel(recipe)
    yield from _pipeline(recipe)
    yield from _recomputation(recipe)
    yield from _weight_decay(recipe)


def _sizes(recipe: Recipe) -> Iterator[Problem]:
    """What no machine trains, and would take for ever to count or to divide up."""
    layers = recipe.model.architecture.num_hidden_layers
    if layers > MAX_LAYERS:
        yield Problem("model.model_config.num_hidden_layers", layers, f"expected at most {MAX_LAYERS:,}")
    for prefix, section in (
        ("model.model_config", recipe.model.architecture),
        ("model", recipe.model),
        ("tokens", recipe.tokens),
        ("parallelism", recipe.parallelism),
        *((f"data_stages.{index}", stage) for index, stage in enumerate(recipe.data_stages)),
    ):
        for name in _SIZES:
            size = getattr(section, name, None)
            if isinstance(size, int) and size > MAX_SIZE:
                yield Problem(f"{prefix}.{name}", size, f"expected at most {MAX_SIZE:,}")


def _shape(recipe: Recipe) -> Iterator[Problem]:
    architecture, key = recipe.model.architecture, "model.model_config"
    hidden, heads, groups = architecture.hidden_size, architecture.num_attention_heads, architecture.num_key_value_heads
    if hidden % heads:
        yield Problem(f"{key}.hidden_size", hidden, f"expected a multiple of num_attention_heads {heads}")
    elif (hidden // heads) % 2:
        yield Problem(f"{key}.hidden_size", hidden, f"expected an even width per head, not {hidden // heads}, for RoPE")
    if heads % groups:
        yield Problem(f"{key}.num_key_value_heads", groups, f"expected a divisor of num_attention_heads {heads}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(architecture, name)
        if token is not None and token >= architecture.vocab_size:
            yield Problem(f"{key}.{name}", token, f"expected less than vocab_size {architecture.vocab_size}")


def _tensor_parallel(recipe: Recipe) -> Iterator[Problem]:
    architecture, tp, key = recipe.model.architecture, recipe.parallelism.tp, "parallelism.tp"
    sizes = {
        name: getattr(architecture, name)
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    }
    for name, number in sizes.items():
        if number % tp:
            works = ", ".join(map(str, divisors(math.gcd(*sizes.values()))))
            yield Problem(key, tp, f"does not divide {name} {number}; expected one of {works}")
    rows = padded_vocab_size(recipe)
    if rows % tp:
        multiple = next_multiple(recipe.model.make_vocab_size_divisible_by, tp)
        yield Problem(
            key,
            tp,
            f"does not divide the padded vocabulary {rows}; set model.make_vocab_size_divisible_by to {multiple} "
            f"(rows: {next_multiple(architecture.vocab_size, multiple)})",
        )
    if recipe.parallelism.tp_mode == "REDUCE_SCATTER":
        lengths = {"tokens.sequence_length": recipe.tokens.sequence_length}
        for index, stage in enumerate(recipe.data_stages):
            lengths[f"data_stages.{index}.sequence_length"] = stage_sequence_length(recipe, stage)
        for key, length in lengths.items():
            if length % tp:
                yield Problem(key, length, f"expected a multiple of tp {tp} in tp_mode REDUCE_SCATTER")


def _pipeline(recipe: Recipe) -> Iterator[Problem]:
    layers, pp = recipe.model.architecture.num_hidden_layers, recipe.parallelism.pp
    if pp > layers:
        yield Problem("parallelism.pp", pp, f"expected at most num_hidden_layers {layers}")


def _recomputation(recipe: Recipe) -> Iterator[Problem]:
    recompute, whole_layer = recipe.parallelism.recompute, recipe.parallelism.recompute_layer
    if (recompute == "full") != whole_layer:
        expected = f"expected to agree with recompute_layer {str(whole_layer).lower()}; leave one of them out"
        yield Problem("parallelism.recompute", recompute, expected)


def _weight_decay(recipe: Recipe) -> Iterator[Problem]:
    names = parameter_names(recipe)
    for index, pattern in enumerate(recipe.optimizer.weight_decay_exclude_named_params):
        key = f"optimizer.weight_decay_exclude_named_params.{index}"
        try:
            matched = any(matches(pattern, name) for name in names)
        except (regex.error, RecursionError, OverflowError) as error:
            yield Problem(key, pattern, f"expected a regular expression: {error}")
            continue
        except TimeoutError:
            yield Problem(key, pattern, "expected a regular expression that does not go on for ever")
            continue
        if not matched:
            yield Problem(key, pattern, f"matches no parameter; they are named like {names[0]}, {names[1]}")
