"""Small recipes, weights and a plain forward pass, shared by the tests of the Hugging Face conversion."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from model.arithmetic import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix, parameter_shapes
from nanotron_recipes.loading import recipe_from_mapping
from nanotron_recipes.recipe import Recipe

ARCHITECTURE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "no_rope_layer": 4,
    "tie_word_embeddings": True,
}


def small_recipe(padded_to: int = 1, dtype: str = "float32", **architecture: Any) -> Recipe:
    """A recipe of ARCHITECTURE with keys replaced; its vocabulary padded to a multiple of `padded_to`."""
    return recipe_from_mapping(
        {
            "general": {"project": "test", "run": "small", "seed": 1},
            "model": {
                "dtype": dtype,
                "model_config": ARCHITECTURE | architecture,
                "init_method": {"std": 0.1},
                "make_vocab_size_divisible_by": padded_to,
            },
            "tokens": {"sequence_length": 32, "train_steps": 10, "micro_batch_size": 1, "global_batch_size": 4},
        },
        source="test",
    ).recipe


def random_weights(recipe: Recipe, seed: int = 0) -> dict[str, torch.Tensor]:
    """Global tensors by our names; padding rows are zero, norm gains are not one."""
    generator = torch.Generator().manual_seed(seed)
    unpadded = parameter_shapes(recipe, padded=False)
    weights = {}
    for name, shape in parameter_shapes(recipe, padded=True).items():
        tensor = torch.randn(shape, generator=generator) * 0.2 + (1.0 if len(shape) == 1 else 0.0)
        tensor[unpadded[name][0] :] = 0
        weights[name] = tensor.to(getattr(torch, recipe.model.dtype))
    return weights


def plain_logits(recipe: Recipe, weights: dict[str, torch.Tensor], token_ids: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, padded vocabulary] of the model that the recipe describes, written out plainly."""
    architecture = recipe.model.architecture
    heads, kv_heads, head_dim = (
        architecture.num_attention_heads,
        architecture.num_key_value_heads,
        architecture.head_dim,
    )

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + architecture.rms_norm_eps) * gain

    inverse = architecture.rope_theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(token_ids.shape[1])[:, None] * inverse

    def rotate(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()), dim=-1)

    hidden = weights[EMBEDDING][token_ids]
    for layer, has_rope in enumerate(architecture.rope_layers):

        def weight(name: str, prefix: str = layer_prefix(layer)) -> torch.Tensor:
            return weights[f"{prefix}{name}.weight"]

        rows = norm(hidden, weight("input_layernorm")) @ weight("attn.qkv_proj").T
        q, k, v = (
            part.unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for part in rows.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
        )
        if architecture.use_qk_norm:
            q, k = norm(q, weight("attn.q_norm")), norm(k, weight("attn.k_norm"))
        if has_rope:
            q, k = rotate(q), rotate(k)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        hidden = hidden + attended.transpose(1, 2).flatten(2) @ weight("attn.o_proj").T
        gate, up = (norm(hidden, weight("post_attention_layernorm")) @ weight("mlp.gate_up_proj").T).chunk(2, dim=-1)
        hidden = hidden + (functional.silu(gate) * up) @ weight("mlp.down_proj").T
    head = weights[EMBEDDING if architecture.tie_word_embeddings else LM_HEAD]
    return norm(hidden, weights[FINAL_NORM]) @ head.T
