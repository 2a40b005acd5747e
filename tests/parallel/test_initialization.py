"""Initial weights: a function of seed and global name, whatever the topology."""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.train.parity import start_engine
from nanotron_recipes.overrides import apply_overrides
from parallel.initialization import generator_for
from parallel.rank_pool import RankPool

Piece = tuple[str, tuple[int, ...], tuple[Any, ...], npt.NDArray[np.float32], npt.NDArray[np.float32]]


def pieces_on_rank(mapping: dict[str, object]) -> list[Piece]:
    """(name, global shape, pairs of slices, parameters, master values) of every slot that this rank holds whole."""
    engine = start_engine(mapping)
    found = []
    for bucket in engine.built.buckets:
        for slot in bucket.slots:
            parameters, master = slot.view(bucket.parameters).float(), slot.view(bucket.master)
            pairs = tuple((_bounds(a), _bounds(b)) for a, b in slot.shard.pairs)
            found.append((slot.name, slot.shard.global_shape, pairs, parameters.numpy().copy(), master.numpy().copy()))
    engine.context.destroy()
    return found


def _bounds(slices: tuple[slice, ...]) -> tuple[tuple[Any, Any], ...]:
    return tuple((None if s.start is None else int(s.start), None if s.stop is None else int(s.stop)) for s in slices)


def whole_tensors(results: list[list[Piece]]) -> dict[str, npt.NDArray[np.float32]]:
    whole: dict[str, npt.NDArray[np.float32]] = {}
    for name, shape, pairs, parameters, _ in (piece for result in results for piece in result):
        target = whole.setdefault(name, np.full(shape, np.nan, dtype=np.float32))
        for local, in_global in pairs:
            here = tuple(slice(*bounds) for bounds in in_global)
            values = parameters[tuple(slice(*bounds) for bounds in local)]
            assert np.isnan(target[here]).all() or np.array_equal(target[here], values), f"{name}: ranks disagree"
            target[here] = values
    return whole


def draw(pool: RankPool, recipe: dict[str, Any], dp: int = 1, pp: int = 1, tp: int = 1) -> list[list[Piece]]:
    overlay = [f"parallelism.{key}={value}" for key, value in (("dp", dp), ("pp", pp), ("tp", tp))]
    return pool.run(dp * pp * tp, pieces_on_rank, apply_overrides(recipe, overlay)[0])


def test_the_same_tensors_are_drawn_at_any_topology(pool: RankPool, small_recipe: dict[str, Any]) -> None:
    reference = whole_tensors(draw(pool, small_recipe))
    assert not any(np.isnan(values).any() for values in reference.values())
    for topology in ({"tp": 2}, {"pp": 4}, {"dp": 2, "pp": 2, "tp": 2}):
        found = whole_tensors(draw(pool, small_recipe, **topology))
        assert found.keys() == reference.keys()
        for name, values in found.items():
            assert np.array_equal(values, reference[name]), name


def test_shards_and_layers_are_unlike_each_other(pool: RankPool, small_recipe: dict[str, Any]) -> None:
    """The bug that this prevents makes the shards of all tensor-parallel ranks equal."""
    first, second = (
        {name: values for name, shape, _, values, _ in result if len(shape) == 2}
        for result in draw(pool, small_recipe, tp=2)
    )
    for name, values in first.items():
        assert abs(np.corrcoef(values.ravel(), second[name].ravel())[0, 1]) < 0.1, name
    layers = [values for name, values in first.items() if name.endswith("down_proj.weight")]
    for a, b in pairwise(layers):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.1


def test_the_master_copy_keeps_the_values_that_were_drawn(pool: RankPool, small_recipe: dict[str, Any]) -> None:
    exact = whole_tensors(draw(pool, small_recipe))
    small_recipe["model"]["dtype"] = "bfloat16"
    [pieces] = draw(pool, small_recipe)
    for name, _, _, parameters, master in pieces:
        assert np.array_equal(master, exact[name])
        assert np.array_equal(parameters, torch.from_numpy(exact[name]).bfloat16().float().numpy())
    assert any(not np.array_equal(parameters, master) for _, _, _, parameters, master in pieces)


def test_values_follow_the_recipe(pool: RankPool, small_recipe: dict[str, Any]) -> None:
    """Norms are 1, padding rows 0, projections to the residual stream narrower by sqrt(2 layers)."""
    whole = whole_tensors(draw(pool, small_recipe))
    std = small_recipe["model"]["init_method"]["std"]
    for name, values in whole.items():
        if "norm" in name:
            assert (values == 1).all()
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            assert values.std() == pytest.approx(std / 8**0.5, rel=0.1)
        else:
            assert values[:510].std() == pytest.approx(std, rel=0.1)
    embedding = whole["model.token_position_embeddings.pp_block.token_embedding.weight"]
    assert embedding.shape[0] == 512 and not embedding[510:].any()


@given(st.integers(0, 2**40), st.text(min_size=1), st.text(min_size=1))
def test_a_stream_belongs_to_one_name_and_seed(seed: int, name: str, other: str) -> None:
    def first_of(seed: int, name: str) -> list[float]:
        return torch.rand(4, generator=generator_for(seed, name)).tolist()

    assert first_of(seed, name) == first_of(seed, name)
    assert first_of(seed, name) != first_of(seed + 1, name)
    assert (first_of(seed, name) == first_of(seed, other)) == (name == other)
