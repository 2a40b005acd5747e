from __future__ import annotations

import pytest
from hf_models import small_recipe

from model.arithmetic import (
    flops_per_token,
    mfu,
    num_non_embedding_parameters,
    num_parameters,
    parameter_shapes,
    weight_bytes,
)
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe

H100_PEAK = 989.5e12


@pytest.fixture(scope="module")
def smollm3() -> Recipe:
    return load_recipe("smollm3-3b").recipe


def test_smollm3_has_its_published_number_of_parameters(smollm3: Recipe) -> None:
    assert num_parameters(smollm3) == 3_075_098_624
    assert num_non_embedding_parameters(smollm3) == 2_812_430_336
    assert weight_bytes(smollm3, "bfloat16") == 6_150_197_248


def test_an_untied_head_is_counted_but_is_no_body() -> None:
    tied, untied = small_recipe(), small_recipe(tie_word_embeddings=False)
    assert num_parameters(untied) - num_parameters(tied) == 96 * 32
    assert num_non_embedding_parameters(untied) == num_non_embedding_parameters(tied)
    assert flops_per_token(untied, "6n") == flops_per_token(tied, "6n"), "the input embedding is a look-up"


def test_padding_rows_count_only_when_asked_for() -> None:
    recipe = small_recipe(padded_to=64)
    assert num_parameters(recipe, padded=True) - num_parameters(recipe) == 32 * 32
    assert next(iter(parameter_shapes(recipe).values())) == (128, 32)
    assert weight_bytes(recipe, "float32") == 4 * num_parameters(recipe)


def test_qk_norm_adds_two_gains_a_layer() -> None:
    plain, with_norm = small_recipe(no_rope_layer=None), small_recipe(no_rope_layer=None, use_qk_norm=True)
    assert num_parameters(with_norm) - num_parameters(plain) == 4 * 2 * 8


@pytest.mark.parametrize(("formula", "percent"), [("6n", 26.1), ("causal", 28.7), ("full", 31.2)])
def test_the_same_run_has_three_utilisations(smollm3: Recipe, formula: str, percent: float) -> None:
    assert round(100 * mfu(smollm3, 14_000, H100_PEAK, formula, sequence_length=4096), 1) == percent
