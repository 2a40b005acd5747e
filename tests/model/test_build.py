"""Building a model at a topology, up to the 3B without its memory."""

import re
from typing import Any

import pytest
import torch

from model.build import build_on_meta, decay_rule, draw_rule
from nanotron_recipes.loading import load_recipe, recipe_from_mapping
from nanotron_recipes.overrides import apply_overrides
from nanotron_recipes.recipe import Recipe
from parallel.parameters import holders_of, named_parameters, shard_of
from parallel.process_groups import EngineContext, init_process_group
from parallel.rank_pool import RankPool

SMOLLM3_PARAMETERS = 3_075_098_624

Inventory = dict[str, tuple[tuple[int, ...], int, int]]


def inventory_on_rank(name: str, pp: int, tp: int) -> Inventory:
    """name -> (global shape, elements on this rank, how many ranks hold the same elements)."""
    recipe = load_recipe(name, [f"parallelism.pp={pp}", f"parallelism.tp={tp}", "parallelism.dp=1"]).recipe
    device = torch.device("cpu")
    init_process_group(device)
    context = EngineContext(1, pp, tp, device)
    module = build_on_meta(recipe, context)
    found = {}
    for global_name, parameter in named_parameters(module):
        assert parameter.device.type == "meta" and parameter.dtype == torch.bfloat16
        found[global_name] = (
            shard_of(parameter).global_shape,
            parameter.numel(),
            len(holders_of(parameter, context.rank)),
        )
    context.destroy()
    return found


@pytest.mark.parametrize(("pp", "tp"), [(1, 1), (1, 2), (2, 1), (4, 1), (2, 2)])
def test_smollm3_3b_has_its_parameters_at(pp: int, tp: int, pool: RankPool) -> None:
    ranks = pool.run(pp * tp, inventory_on_rank, "smollm3-3b", pp, tp)
    shapes: dict[str, tuple[int, ...]] = {}
    held = 0.0
    for inventory in ranks:
        assert inventory, "a stage without parameters"
        for name, (shape, numel, holders) in inventory.items():
            assert shapes.setdefault(name, shape) == shape
            held += numel / holders
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == SMOLLM3_PARAMETERS
    assert held == SMOLLM3_PARAMETERS, "every element is on exactly one holder, or on all its holders"


def recipe_with(mapping: dict[str, Any], *overrides: str) -> Recipe:
    return recipe_from_mapping(apply_overrides(mapping, overrides)[0], source="test").recipe


def test_weight_decay_leaves_out_what_the_patterns_match(small_recipe: dict[str, Any]) -> None:
    decayed = decay_rule(recipe_with(small_recipe))
    assert not decayed("model.token_position_embeddings.pp_block.token_embedding.weight")
    assert decayed("model.decoder.0.pp_block.mlp.down_proj.weight")


@pytest.mark.parametrize(
    ("method", "factors"),
    [("NONE", [1.0, 1.0]), ("NUM_LAYERS", [8**-0.5, 8**-0.5]), ("LAYER_INDEX", [2**-0.5, 8**-0.5])],
)
def test_projections_to_the_residual_stream_are_scaled_by(
    method: str, factors: list[float], small_recipe: dict[str, Any]
) -> None:
    draw = draw_rule(recipe_with(small_recipe, f"model.init_method.scaling_method={method}"))
    for layer, factor in zip((0, 3), factors, strict=True):
        for part in ("attn.o_proj", "mlp.down_proj"):
            name = f"model.decoder.{layer}.pp_block.{part}.weight"
            values = draw(name, (200, 200), torch.Generator().manual_seed(0))
            assert float(values.std()) == pytest.approx(0.12 * factor, rel=0.02), re.sub(r"\d", "*", name)
