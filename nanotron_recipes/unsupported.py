"""What a recipe may say and this version cannot train."""

from __future__ import annotations

from nanotron_recipes.errors import show_value
from nanotron_recipes.recipe import Recipe


def unsupported_features(recipe: Recipe) -> list[str]:
    """Return one line per setting that `validate` accepts and `pretrain` must refuse, because leaving it out would
    train something else than the recipe says."""
    architecture, parallelism = recipe.model.architecture, recipe.parallelism
    wanted = {
        "parallelism.context_parallel_size": (parallelism.context_parallel_size, 1, "context parallelism"),
        "parallelism.expert_parallel_size": (parallelism.expert_parallel_size, 1, "expert parallelism"),
        "model.model_config.moe_config": (architecture.moe_config, None, "mixture of experts"),
        "model.model_config.attention_bias": (architecture.attention_bias, False, "biases in attention"),
        "model.model_config.sliding_window_size": (architecture.sliding_window_size, None, "sliding-window attention"),
        "model.model_config.rope_scaling": (architecture.rope_scaling, None, "RoPE scaling"),
        "model.model_config.rope_interleaved": (architecture.rope_interleaved, False, "interleaved RoPE"),
        "model.model_config.flex_attention_mask": (architecture.flex_attention_mask, None, "flex attention"),
    }
    return [
        f"{key}: {show_value(value)}: {feature} is not available yet; pretrain needs {show_value(neutral)} here"
        for key, (value, neutral, feature) in wanted.items()
        if value != neutral
    ]
