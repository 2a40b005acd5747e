"""What the keys of a Hugging Face config.json that mean something to us may hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nanotron_recipes.errors import user_error
from nanotron_recipes.model_checks import MAX_LAYERS

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Keys without which a model is not described."""

_Test = Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_whole(value) and value >= 1


def _is_token_id(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < 1e300


def _is_list_of(test: _Test) -> _Test:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(test, value))


def _is_rope(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    theta, factor = value.get("rope_theta"), value.get("partial_rotary_factor")
    return (theta is None or _is_positive(theta)) and (factor is None or _is_number(factor))


_SIZE = (_is_size, "a whole number of at least 1")
_NUMBER = (_is_number, "a number")
_POSITIVE = (_is_positive, "a number above 0")
_BOOLEAN = (lambda value: isinstance(value, bool), "true or false")
_TEXT = (lambda value: isinstance(value, str), "text")
_TEXTS = (_is_list_of(_TEXT[0]), "a list of names")
_TOKEN = (_is_token_id, "a token id")
_ROPE = (_is_rope, "an object with a number for rope_theta")

_TYPES: dict[str, tuple[_Test, str]] = {
    **dict.fromkeys(REQUIRED, _SIZE),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings", "no_rope_layer_interval"), _SIZE),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "initializer_range"), _POSITIVE),
    "attention_dropout": _NUMBER,
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), _BOOLEAN),
    "hidden_act": _TEXT,
    "layer_types": _TEXTS,
    "bos_token_id": _TOKEN,
    "pad_token_id": _TOKEN,
    "eos_token_id": (
        lambda value: _is_token_id(value) or _is_list_of(_is_token_id)(value),
        "a token id, or a list of them",
    ),
    "rope_parameters": _ROPE,
    "rope_scaling": _ROPE,
}
"""Test and description of each key; null stands for the class's default."""


def check_types(config: Mapping[str, Any], source: str) -> None:
    """Raise UserError for a key whose value is of another type than transformers writes, or required and not there."""
    for key, (test, expected) in _TYPES.items():
        value = config.get(key)
        if (value is None and key in REQUIRED) or not (value is None or test(value)):
            raise user_error(f"expected {expected}", source=source, key=key, value=value)
    layers, listed = config["num_hidden_layers"], config.get("no_rope_layers")
    if layers > MAX_LAYERS:
        raise user_error(f"expected at most {MAX_LAYERS:,}", source=source, key="num_hidden_layers", value=layers)
    if listed is not None and not (isinstance(listed, list) and len(listed) == layers and all(map(_is_flag, listed))):
        expected = f"expected a 0 (no RoPE) or 1 for each of the {layers} layers"
        raise user_error(expected, source=source, key="no_rope_layers", value=listed)


def _is_flag(value: Any) -> bool:
    return _is_whole(value) and value in (0, 1)
