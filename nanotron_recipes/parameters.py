"""The global names of the model's parameters, which weight-decay patterns, checkpoints and conversion share."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nanotron_recipes.recipe import Recipe


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
    return not any(re.match(pattern, name) for pattern in exclude)
