"""The whole model on one rank: what its switches do to the logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from naive_attention import positions_of

from model.build import build_model, initialize_weights
from model.llama import mask_padding
from nanotron_recipes.loading import recipe_from_mapping
from nanotron_recipes.overrides import apply_overrides
from parallel.process_groups import single_process_context

VOCABULARY, LENGTH = 510, 12


def token_ids(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(5))


def logits(
    recipe: dict[str, Any],
    tokens: torch.Tensor,
    positions: torch.Tensor,
    *overrides: str,
    change: Callable[[str, torch.Tensor], object] = lambda name, parameter: None,
) -> torch.Tensor:
    """[B, S, padded vocabulary] with the recipe's initial weights, of which `change` may change some in place."""
    mapping, _ = apply_overrides(recipe, overrides)
    with single_process_context(torch.device("cpu")) as context, torch.no_grad():
        built = build_model(recipe_from_mapping(mapping, source="test").recipe, context)
        initialize_weights(built)
        for name, parameter in built.module.named_parameters():
            change(name, parameter)
        arrays = {
            "input_ids": tokens,
            "target_ids": tokens,
            "target_mask": torch.ones_like(tokens, dtype=torch.bool),
            "position_ids": positions.expand_as(tokens),
        }
        built.current.set(built.prepare(arrays))
        found: torch.Tensor = built.module.model().view(*tokens.shape, -1)
        return found


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_a_token_sees_no_later_one(small_recipe: dict[str, Any]) -> None:
    tokens, positions = token_ids(), torch.arange(LENGTH)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCABULARY
    before, after = (logits(small_recipe, these, positions) for these in (tokens, changed))
    assert torch.equal(before[:, :7], after[:, :7])
    assert largest(before[:, 7:], after[:, 7:]) > 1e-2


def test_packed_documents_are_computed_as_if_alone(small_recipe: dict[str, Any]) -> None:
    lengths = [5, 1, 6]
    tokens = token_ids(1)
    packed = logits(small_recipe, tokens, positions_of(lengths))
    alone = [logits(small_recipe, part, torch.arange(part.shape[1])) for part in tokens.split(lengths, dim=1)]
    assert largest(packed, torch.cat(alone, dim=1)) < 1e-5
    unmasked = logits(small_recipe, tokens, positions_of(lengths), "model.model_config._use_doc_masking=false")
    assert largest(packed[:, :5], unmasked[:, :5]) < 1e-5
    assert largest(packed[:, 5:], unmasked[:, 5:]) > 1e-2


@pytest.mark.parametrize(("every", "sees_positions"), [("1", False), ("4", True), ("null", True)])
def test_layers_without_rope_ignore_positions(every: str, sees_positions: bool, small_recipe: dict[str, Any]) -> None:
    """Doubled positions keep the order and change every distance."""
    overrides = (f"model.model_config.no_rope_layer={every}", "model.model_config._use_doc_masking=false")
    near, far = (logits(small_recipe, token_ids(), torch.arange(LENGTH) * k, *overrides) for k in (1, 2))
    assert (largest(near, far) > 1e-3) == sees_positions


def triple_queries_and_keys(name: str, parameter: torch.Tensor) -> None:
    if name.endswith("qkv_proj.weight"):
        parameter[: (4 + 2) * 8] *= 3


def uneven_gains(name: str, parameter: torch.Tensor) -> None:
    if name.endswith("q_norm.weight"):
        parameter.copy_(torch.linspace(0.5, 4.0, parameter.numel()))


@pytest.mark.parametrize("use_qk_norm", [True, False])
def test_qk_norm_makes_the_scale_of_queries_and_keys_irrelevant(
    use_qk_norm: bool, small_recipe: dict[str, Any]
) -> None:
    tokens, positions = token_ids(), torch.arange(LENGTH)
    override = f"model.model_config.use_qk_norm={str(use_qk_norm).lower()}"
    before = logits(small_recipe, tokens, positions, override)
    tripled = logits(small_recipe, tokens, positions, override, change=triple_queries_and_keys)
    assert (largest(before, tripled) < 1e-4) == use_qk_norm
    gained = logits(small_recipe, tokens, positions, override, change=uneven_gains)
    assert (largest(before, gained) > 1e-3) == use_qk_norm


def test_untied_models_have_a_head_of_their_own(small_recipe: dict[str, Any]) -> None:
    tokens, positions = token_ids(), torch.arange(LENGTH)
    tied = logits(small_recipe, tokens, positions)
    untied = logits(small_recipe, tokens, positions, "model.model_config.tie_word_embeddings=false")
    assert largest(tied, untied) > 1e-2


class Group:
    """A tensor-parallel rank."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank


def test_padding_columns_are_masked_on_the_ranks_that_have_them() -> None:
    shard = torch.zeros(3, 256)
    assert mask_padding(shard, VOCABULARY, Group(0)) is shard
    masked = mask_padding(shard, VOCABULARY, Group(1))
    assert bool((masked[:, -2:] == float("-inf")).all()) and bool((masked[:, :-2] == 0).all())
    assert bool((mask_padding(shard, 256, Group(1)) == float("-inf")).all())
