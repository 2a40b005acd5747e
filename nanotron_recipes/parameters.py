"""The global names of the model's parameters, which weight-decay patterns, checkpoints and conversion share."""

from __future__ import annotations

from collections.abc import Iterable

import regex

from nanotron_recipes.recipe import Recipe

_MATCH_SECONDS = 1.0


def parameter_names(recipe: Recipe) -> list[str]:
    """Return the global names of all parameters in the order of the network; a tied output matrix has none."""
    architecture = recipe.model.architecture
    layer = ["input_layernorm", "attn.qkv_proj", "attn.o_proj", "post_attention_layernorm"]
    layer += ["mlp.gate_up_proj", "mlp.down_proj"]
    if architecture.use_qk_norm:
        layer[2:2] = ["attn.q_norm", "attn.k_norm"]
    names = ["model.token_position_embeddings.pp_block.token_embedding.weight"]
    for index in range(architecture.num_hidden_layers):
        names += [f"model.decoder.{index}.pp_block.{part}.weight" for part in layer]
    names.append("model.final_layer_norm.pp_block.weight")
    if not architecture.tie_word_embeddings:
        names.append("model.lm_head.pp_block.weight")
    return names


def is_decayed(name: str, exclude: Iterable[str]) -> bool:
    """Return whether weight decay applies to a parameter: no pattern matches its global name from the start."""
    return not any(matches(pattern, name) for pattern in exclude)


def matches(pattern: str, name: str) -> bool:
    """Return whether a regular expression matches a name from its start.

    Raises regex.error for what is none, TimeoutError for one that backtracks without end.
    """
    return regex.match(pattern, name, timeout=_MATCH_SECONDS) is not None
