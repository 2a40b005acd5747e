from __future__ import annotations

import pytest
import torch
from hf_models import random_weights, small_recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from model.arithmetic import parameter_shapes
from model.hf_mapping import (
    LLAMA,
    QWEN3,
    SMOLLM3,
    TokenIds,
    fuse_from_hf,
    hf_class,
    hf_config,
    hf_shapes,
    no_rope_layer_of,
    parameter_map,
    split_to_hf,
    token_ids_of,
)
from nanotron_recipes.errors import UserError


def test_the_class_follows_from_rope_and_qk_norm() -> None:
    assert hf_class(small_recipe()) == SMOLLM3
    assert hf_class(small_recipe(no_rope_layer=None)) == LLAMA
    assert hf_class(small_recipe(no_rope_layer=5)) == LLAMA, "no layer is a fifth one"
    assert hf_class(small_recipe(no_rope_layer=None, use_qk_norm=True)) == QWEN3


def test_qk_norm_with_nope_layers_has_no_class() -> None:
    with pytest.raises(UserError, match="use_qk_norm"):
        hf_class(small_recipe(use_qk_norm=True))


@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(1, 5),
    kv_heads=st.sampled_from([1, 2, 4]),
    vocab=st.integers(5, 70),
    padded_to=st.sampled_from([1, 8, 64]),
    tied=st.booleans(),
    qk_norm=st.booleans(),
)
def test_split_and_fuse_are_inverse_and_drop_only_padding(
    layers: int, kv_heads: int, vocab: int, padded_to: int, tied: bool, qk_norm: bool
) -> None:
    recipe = small_recipe(
        padded_to,
        num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        use_qk_norm=qk_norm,
        no_rope_layer=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    ours = random_weights(recipe)
    entries = {entry.name: entry for entry in parameter_map(recipe)}
    theirs = {name: piece for key, tensor in ours.items() for name, piece in split_to_hf(entries[key], tensor)}
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == hf_shapes(recipe)
    for name, shape in parameter_shapes(recipe).items():
        assert torch.equal(fuse_from_hf(entries[name], theirs.__getitem__, shape[0]), ours[name])


def test_a_tensor_of_another_shape_is_refused() -> None:
    entry = parameter_map(small_recipe())[0]
    with pytest.raises(UserError, match="token_embedding"):
        split_to_hf(entry, torch.zeros(90, 32))


def test_no_rope_layers_is_written_inverted() -> None:
    config = hf_config(
        small_recipe(num_hidden_layers=6), dtype="bfloat16", token_ids=TokenIds(), transformers_version="5"
    )
    assert config["no_rope_layers"] == [1, 1, 1, 0, 1, 1]
    assert config["no_rope_layer_interval"] == 4
    assert config["dtype"] == "bfloat16"
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}


@given(layers=st.integers(1, 40), every=st.integers(1, 45))
def test_every_nth_layer_without_rope_is_recognised(layers: int, every: int) -> None:
    rope = [int((layer + 1) % every != 0) for layer in range(layers)]
    assert no_rope_layer_of(rope, "config.json") == (every if every <= layers else None)


@pytest.mark.parametrize("layers", [[1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 1, 0]])
def test_other_patterns_of_layers_without_rope_are_refused(layers: list[int]) -> None:
    with pytest.raises(UserError, match=r"^my/config\.json: no_rope_layers: \["):
        no_rope_layer_of(layers, "my/config.json")


def test_special_tokens_outside_a_small_vocabulary_are_not_exported() -> None:
    recipe = small_recipe(bos_token_id=1, eos_token_id=95, pad_token_id=3)
    assert token_ids_of(recipe) == TokenIds(1, 95, 3)
    assert token_ids_of(recipe, {"eos": 0, "pad": 200}) == TokenIds(1, 0, None)
