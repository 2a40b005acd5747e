"""Activation recomputation: the same training to the bit, less memory, and what each setting computes twice."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kept_tensors import kept_bytes
from data.batch import MicroBatch
from launch.train.engine import TrainingEngine
from launch.train.parity import TopologyResult, disagreements, run_topologies
from launch.train.synthetic import synthetic_batch
from model.build import build_model, initialize_weights
from model.llama import DecoderLayer
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe, recipe_from_mapping
from nanotron_recipes.overrides import apply_overrides
from nanotron_recipes.topology import resolve_topology
from parallel.process_groups import single_process_context
from parallel.rank_pool import RankPool

MODES = ("none", "selective", "full")
GRIDS: dict[str, tuple[str, ...]] = {
    "one rank, two micro-batch sizes": ("tokens.micro_batch_size=2",),
    "1f1b": ("parallelism.pp=2", "tokens.micro_batch_size=2"),
    "afab": ("parallelism.pp=2", "tokens.micro_batch_size=2", "parallelism.pp_engine=afab"),
    "tp, REDUCE_SCATTER": ("parallelism.tp=2",),
    "tp, ALL_REDUCE, QK-norm": (
        "parallelism.tp=2",
        "parallelism.tp_mode=ALL_REDUCE",
        "model.model_config.use_qk_norm=true",
    ),
    "tp, asynchronous": ("parallelism.tp=2", "parallelism.tp_linear_async_communication=true"),
    "all, ZeRO-1, bfloat16": (
        "parallelism.dp=2",
        "parallelism.pp=2",
        "parallelism.tp=2",
        "optimizer.zero_stage=1",
        "model.dtype=bfloat16",
    ),
}


def tensors_of(arrays: MicroBatch) -> dict[str, torch.Tensor]:
    """What a built model prepares."""
    keys = ("input_ids", "target_ids", "target_mask", "position_ids")
    return {key: torch.from_numpy(getattr(arrays, key)) for key in keys}


def recompute(mode: str) -> str:
    return f"parallelism.recompute={mode}"


@pytest.mark.parametrize("grid", GRIDS)
def test_training_is_the_same_to_the_bit(grid: str, pool: RankPool, base_recipe: dict[str, Any]) -> None:
    matrix = [(*GRIDS[grid], recompute(mode)) for mode in MODES]
    plain, *others = run_topologies(base_recipe, matrix, num_steps=2, pool=pool)
    for other in others:
        assert (other.losses, other.grad_norms) == (plain.losses, plain.grad_norms)
        assert other.weights_digest == plain.weights_digest
        assert other.unequal_copies == []


def newest_micro_batch_in_recomputed_layers(engine: TrainingEngine) -> None:
    """A layer that is recomputed sees the micro-batch that came last, not its own."""
    for module in engine.built.module.modules():
        if isinstance(module, DecoderLayer):
            layer, current = module._layer, module.current
            module._layer = lambda hidden, _, layer=layer, current=current: layer(hidden, current.value)  # type: ignore[method-assign,misc]


def run_1f1b(pool: RankPool, recipe: dict[str, Any], mode: str, plant: Any = None) -> TopologyResult:
    [result] = run_topologies(recipe, [(*GRIDS["1f1b"], recompute(mode))], num_steps=2, pool=pool, plant=plant)
    return result


def test_recomputing_with_the_newest_micro_batch_is_noticed(pool: RankPool, base_recipe: dict[str, Any]) -> None:
    plain = run_1f1b(pool, base_recipe, "none")
    plant = newest_micro_batch_in_recomputed_layers
    assert disagreements(plain, run_1f1b(pool, base_recipe, "none", plant)) == [], (
        "harmless where nothing is recomputed"
    )
    assert disagreements(plain, run_1f1b(pool, base_recipe, "full", plant)), "the bug went unnoticed"


class _Counted(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def one_micro_batch(recipe: dict[str, Any], mode: str) -> tuple[int, Counter[str]]:
    """Bytes kept after the forward pass, and the operations of forward and backward."""
    mapping, _ = apply_overrides(recipe, [recompute(mode)])
    checked = recipe_from_mapping(mapping, source="test").recipe
    with single_process_context(torch.device("cpu")) as context:
        built = build_model(checked, context)
        initialize_weights(built)
        arrays = synthetic_batch(checked, resolve_topology(checked, 1), 1, 0).micro_batches[0]
        micro_batch = built.prepare(tensors_of(arrays))
        with _Counted() as counted:
            kept = kept_bytes(built, micro_batch)
    return kept, counted.calls


def test_what_is_kept_and_what_runs_twice(small_recipe: dict[str, Any]) -> None:
    shape = small_recipe["model"]["model_config"]
    layers, hidden, size = shape["num_hidden_layers"], shape["hidden_size"], shape["intermediate_size"]
    tokens = small_recipe["tokens"]["micro_batch_size"] * small_recipe["tokens"]["sequence_length"]
    (plain, plain_calls), (selective, selective_calls), (full, full_calls) = (
        one_micro_batch(small_recipe, mode) for mode in MODES
    )
    # Two normed inputs and their scales, silu(gate), and silu(gate) * up.
    assert plain - selective == layers * tokens * 4 * (2 * hidden + 2 + 2 * size)
    assert selective_calls["mm"] == plain_calls["mm"], "no matrix product runs twice"
    # Of the layers only their inputs are left.
    outside = plain - full
    assert outside > 0.8 * layers * tokens * 4 * (7 * hidden + 4 * size)
    assert full_calls["mm"] == plain_calls["mm"] + 3 * layers, "the last of a layer's four products is not needed"


def forward_pass(recipe: dict[str, Any], mode: str, *, evaluates: bool) -> tuple[int, int]:
    """Matrix products of a forward pass, and how many tensors autograd keeps of it."""
    mapping, _ = apply_overrides(recipe, [recompute(mode)])
    checked = recipe_from_mapping(mapping, source="test").recipe
    kept: list[torch.Tensor] = []
    with single_process_context(torch.device("cpu")) as context:
        built = build_model(checked, context)
        initialize_weights(built)
        arrays = synthetic_batch(checked, resolve_topology(checked, 1), 1, 0).micro_batches[0]
        micro_batch = built.prepare(tensors_of(arrays))
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda nothing: nothing)
        with torch.set_grad_enabled(not evaluates), hooks, _Counted() as counted:
            built.module(micro_batch)
    return counted.calls["mm"], len(kept)


def test_evaluation_keeps_nothing_and_recomputes_nothing(small_recipe: dict[str, Any]) -> None:
    products, kept = forward_pass(small_recipe, "none", evaluates=False)
    assert products == 4 * small_recipe["model"]["model_config"]["num_hidden_layers"] + 1 and kept > products
    for mode in MODES:
        assert forward_pass(small_recipe, mode, evaluates=True) == (products, 0)


@pytest.mark.parametrize(
    ("given", "mode", "whole_layer"),
    [
        ((), "none", False),
        (("recompute_layer=true",), "full", True),
        (("recompute_layer=false",), "none", False),
        (("recompute=FULL",), "full", True),
        (("recompute=selective",), "selective", False),
        (("recompute=null", "recompute_layer=false"), "none", False),
        (("recompute=full", "recompute_layer=true"), "full", True),
    ],
)
def test_both_keys_say_the_same(given: tuple[str, ...], mode: str, whole_layer: bool) -> None:
    recipe = load_recipe("tiny", [f"parallelism.{override}" for override in given]).recipe
    assert (recipe.parallelism.recompute, recipe.parallelism.recompute_layer) == (mode, whole_layer)
    assert f"recompute: {mode}\n" in dump_yaml(recipe)


@pytest.mark.parametrize(("mode", "whole_layer"), [("none", "true"), ("selective", "true"), ("full", "false")])
def test_keys_that_disagree_are_a_mistake(mode: str, whole_layer: str) -> None:
    overrides = [f"parallelism.recompute={mode}", f"parallelism.recompute_layer={whole_layer}"]
    with pytest.raises(UserError, match=f"recompute: '{mode}': expected to agree with recompute_layer {whole_layer}"):
        load_recipe("tiny", overrides)
