"""Checkpoints hold global tensors: a run goes on at any topology."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.train.engine import TrainingEngine
from launch.train.parity import FLOAT32, start_engine
from launch.train.synthetic import synthetic_batch
from nanotron_recipes.errors import UserError
from nanotron_recipes.overrides import apply_overrides
from nanotron_recipes.schedule import learning_rate_at
from parallel.checkpoint import load_checkpoint, read_state, read_tensors, save_checkpoint
from parallel.checkpoint_fit import require_same_model
from parallel.rank_pool import RankFailure, RankPool

SAVED_AT, LAST = 2, 4


def train(engine: TrainingEngine, first: int, last: int) -> list[float]:
    """Losses and gradient norms of the steps `first` to `last`."""
    found = []
    for step in range(first, last + 1):
        batch = synthetic_batch(engine.recipe, engine.topology, step, engine.context.dp_rank)
        result = engine.train_step(batch, learning_rate_at(engine.recipe, step))
        found += [result.loss, result.grad_norm]
    return found


def save_on_rank(mapping: dict[str, object], folder: Path) -> list[float]:
    engine = start_engine(mapping)
    train(engine, 1, SAVED_AT)
    save_checkpoint(folder, engine.built.buckets, engine.optimizer, {"step": SAVED_AT}, {"note.txt": "text"})
    found = train(engine, SAVED_AT + 1, LAST)
    engine.context.destroy()
    return found


def resume_on_rank(mapping: dict[str, object], folder: Path) -> list[float]:
    engine = start_engine(mapping)
    assert load_checkpoint(folder, engine.built.buckets, engine.optimizer)["step"] == SAVED_AT
    found = train(engine, SAVED_AT + 1, LAST)
    engine.context.destroy()
    return found


def at(recipe: dict[str, Any], dp: int, pp: int, tp: int, zero: int) -> tuple[int, dict[str, Any]]:
    overlay = [f"parallelism.dp={dp}", f"parallelism.pp={pp}", f"parallelism.tp={tp}", f"optimizer.zero_stage={zero}"]
    return dp * pp * tp, apply_overrides(recipe, overlay)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / str(SAVED_AT)


def test_resuming_at_another_topology_continues_the_run(
    pool: RankPool, small_recipe: dict[str, Any], folder: Path
) -> None:
    world_size, mapping = at(small_recipe, 2, 1, 2, 1)
    undisturbed = pool.run(world_size, save_on_rank, mapping, folder)[0]
    for topology in ((1, 1, 1, 0), (3, 2, 1, 1)):
        world_size, mapping = at(small_recipe, *topology)
        resumed = pool.run(world_size, resume_on_rank, mapping, folder)[0]
        assert resumed == pytest.approx(undisturbed, abs=FLOAT32.loss), topology


MATRIX = [(2, 2, 2, 1), (1, 1, 2, 0), (2, 1, 1, 1), (3, 1, 1, 1), (1, 2, 1, 0), (1, 4, 1, 0)]
"""(dp, pp, tp, ZeRO stage)."""


def resave_on_rank(mapping: dict[str, object], folder: Path, again: Path) -> list[float]:
    engine = start_engine(mapping)
    state = load_checkpoint(folder, engine.built.buckets, engine.optimizer)
    save_checkpoint(again, engine.built.buckets, engine.optimizer, {"step": state["step"]})
    found = train(engine, SAVED_AT + 1, LAST)
    engine.context.destroy()
    return found


@pytest.mark.long
@pytest.mark.parametrize("saved_at", MATRIX)
def test_every_topology_reads_what_any_other_has_written(
    saved_at: tuple[int, int, int, int], pool: RankPool, small_recipe: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    world_size, mapping = at(small_recipe, *saved_at)
    undisturbed = pool.run(world_size, save_on_rank, mapping, folder)[0]
    written = dict(read_tensors(folder, ""))
    for topology in [*MATRIX, (1, 1, 1, 0)]:
        world_size, mapping = at(small_recipe, *topology)
        again = tmp_path / "again" / str(SAVED_AT)
        resumed = pool.run(world_size, resave_on_rank, mapping, folder, again)[0]
        assert resumed == pytest.approx(undisturbed, abs=1e-5), topology
        gathered = dict(read_tensors(again, ""))
        assert gathered.keys() == written.keys()
        assert all(torch.equal(gathered[name], written[name]) for name in written), topology


def masters_on_rank(mapping: dict[str, object], folder: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of a whole model that has read a checkpoint without its optimizer, and written it again."""
    engine = start_engine(mapping)
    load_checkpoint(folder, engine.built.buckets, engine.optimizer, load_optimizer=False)
    again = folder.with_name("again")
    save_checkpoint(again, engine.built.buckets, engine.optimizer, {"step": SAVED_AT})
    engine.context.destroy()
    return dict(read_tensors(again, "" if mapping["model"]["dtype"] == "float32" else "optimizer/master/"))  # type: ignore[index]


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_model_of_another_dtype_reads_the_float32_weights_of_a_checkpoint(
    dtypes: tuple[str, str], pool: RankPool, small_recipe: dict[str, Any], folder: Path
) -> None:
    saved, read = ({**small_recipe, "model": {**small_recipe["model"], "dtype": dtype}} for dtype in dtypes)
    world_size, mapping = at(saved, 2, 1, 1, 1)
    pool.run(world_size, save_on_rank, mapping, folder)
    fine = dict(read_tensors(folder, "model/" if dtypes[0] == "float32" else "optimizer/master/"))
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in fine.values())
    world_size, mapping = at(read, 1, 2, 1, 0)
    found = pool.run(world_size, masters_on_rank, mapping, folder)[0]
    assert {name.removeprefix("model/") for name in found} >= fine.keys()
    for name, weight in fine.items():
        assert torch.equal(found[name if name in found else f"model/{name}"], weight), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resuming_at_the_same_topology_is_bit_equal(
    dtype: str, pool: RankPool, small_recipe: dict[str, Any], folder: Path
) -> None:
    small_recipe["model"]["dtype"] = dtype
    world_size, mapping = at(small_recipe, 2, 2, 1, 1)
    undisturbed = pool.run(world_size, save_on_rank, mapping, folder)
    assert pool.run(world_size, resume_on_rank, mapping, folder) == undisturbed
    assert len({tuple(losses[::2]) for losses in undisturbed}) == 1


def test_what_is_saved_can_be_read_by_one_process_tensor_by_tensor(
    pool: RankPool, small_recipe: dict[str, Any], folder: Path
) -> None:
    world_size, mapping = at(small_recipe, 1, 2, 2, 0)
    pool.run(world_size, save_on_rank, mapping, folder)
    tensors = dict(read_tensors(folder))
    embedding = tensors["model.token_position_embeddings.pp_block.token_embedding.weight"]
    assert embedding.shape == (512, 32) and torch.isfinite(embedding).all() and not embedding[510:].any()
    assert "model.lm_head.pp_block.weight" not in tensors, "tied: one tensor"
    assert sum(name.startswith("model.decoder.") for name in tensors) == 4 * 6
    assert read_state(folder)["step"] == SAVED_AT and (folder / "note.txt").read_text() == "text"
    assert [path.name for path in folder.parent.iterdir()] == [str(SAVED_AT)], "nothing half-written is left"


def layers(recipe: dict[str, Any], count: int) -> dict[str, Any]:
    mapping = at(recipe, 1, 2, 1, 1)[1]
    mapping["model"]["model_config"]["num_hidden_layers"] = count
    return mapping


def test_a_checkpoint_of_another_model_is_refused(pool: RankPool, small_recipe: dict[str, Any], folder: Path) -> None:
    pool.run(1, save_on_rank, small_recipe, folder)
    small_recipe["model"]["model_config"]["intermediate_size"] = 96
    with pytest.raises(RankFailure, match=r"UserError.*another model: model/\S+ is \(32, 64\), and \(32, 96\) in"):
        pool.run(1, resume_on_rank, small_recipe, folder)


def test_a_checkpoint_with_more_or_fewer_layers_is_refused(
    pool: RankPool, small_recipe: dict[str, Any], folder: Path
) -> None:
    pool.run(2, save_on_rank, layers(small_recipe, 4), folder)
    # On two stages: each of them has a part of the layers alone, and both must find what is wrong.
    with pytest.raises(
        RankFailure, match=r"UserError.*another model: it has model/model\.decoder\.3\.\S+ \(and 5 more"
    ):
        pool.run(2, resume_on_rank, layers(small_recipe, 3), folder)
    with pytest.raises(
        RankFailure, match=r"UserError.*another model: it has no model/model\.decoder\.4\.\S+ \(and 5 m"
    ):
        pool.run(2, resume_on_rank, layers(small_recipe, 5), folder)


def test_tensors_are_compared_by_name_and_shape_below_every_prefix(tmp_path: Path) -> None:
    expected = {"a": (2, 3), "b": (4,)}
    there = {f"{prefix}{name}": shape for prefix in ("model/", "moment/") for name, shape in expected.items()}
    require_same_model(tmp_path, {**there, "other/c": (1,)}, expected, ["model/", "moment/"])
    for change, expectation in (
        ({"moment/c": (1,)}, "it has moment/c, and the recipe's model has not"),
        ({"moment/a": (3, 2)}, r"moment/a is \(3, 2\), and \(2, 3\)"),
    ):
        with pytest.raises(UserError, match=expectation):
            require_same_model(tmp_path, {**there, **change}, expected, ["model/", "moment/"])
    del there["moment/b"]
    with pytest.raises(UserError, match="it has no moment/b"):
        require_same_model(tmp_path, there, expected, ["model/", "moment/"])


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a checkpoint"):
        read_state(tmp_path)
