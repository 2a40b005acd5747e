"""Saving in the background: training goes on meanwhile, and whatever happens to the save is reported."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.train.parity import start_engine
from launch.train.synthetic import synthetic_batch
from parallel.checkpoint import load_checkpoint
from parallel.checkpoint_files import verify_checkpoint_files
from parallel.checkpoint_saver import CheckpointSaver
from parallel.checkpoint_tensors import readable_tensors
from parallel.checkpoint_writer import CheckpointInfo
from parallel.rank_pool import RankPool


def copies(engine: Any) -> dict[str, list[torch.Tensor]]:
    return {
        name: [box.values.clone() for box in tensor.boxes]  # type: ignore[attr-defined]
        for name, tensor in readable_tensors(engine.built.buckets, engine.optimizer).items()
    }


def train(engine: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        engine.train_step(synthetic_batch(engine.recipe, engine.topology, step, engine.context.dp_rank), 1e-3)


def save_train_and_load_on_rank(mapping: dict[str, object], folder: Path) -> tuple[list[Any], bool, bool]:
    engine = start_engine(mapping)
    saver = CheckpointSaver(engine.built.buckets, engine.optimizer, engine.context)
    train(engine, 1, 2)
    then = []
    saver.start(CheckpointInfo(folder / "2", {"step": 2}), lambda: then.append("called"))
    expected = copies(engine)
    train(engine, 3, 4)
    saver.start(CheckpointInfo(folder / "4", {"step": 4}))
    saver.wait()
    load_checkpoint(folder / "2", engine.built.buckets, engine.optimizer)
    found = copies(engine)
    is_equal = all(
        torch.equal(one, other) for name in expected for one, other in zip(expected[name], found[name], strict=True)
    )
    outcomes = saver.finished()
    engine.context.destroy()
    return outcomes, is_equal, then == ["called"]


def test_what_is_saved_is_the_state_of_the_moment_while_training_goes_on(
    pool: RankPool, small_recipe: dict[str, Any], tmp_path: Path
) -> None:
    small_recipe["parallelism"] |= {"dp": 2, "tp": 2}
    small_recipe["model"]["dtype"] = "bfloat16"
    for outcomes, is_equal, was_called in pool.run(4, save_train_and_load_on_rank, small_recipe, tmp_path):
        assert is_equal and was_called
        assert [(outcome.step, outcome.error) for outcome in outcomes] == [(2, None), (4, None)]
        assert all(outcome.num_bytes > 500_000 and outcome.write_seconds > 0 for outcome in outcomes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]
    assert verify_checkpoint_files(tmp_path / "2") == verify_checkpoint_files(tmp_path / "4") == []
    # Without ZeRO both replicas hold everything; each writes its half, once.
    sizes = [(tmp_path / "2" / f"__{rank}_0.distcp").stat().st_size for rank in range(4)]
    assert max(sizes) < 1.3 * min(sizes)


def fail_then_succeed_on_rank(mapping: dict[str, object], folder: Path) -> list[Any]:
    engine = start_engine(mapping)
    saver = CheckpointSaver(engine.built.buckets, engine.optimizer, engine.context)
    saver.start(CheckpointInfo(folder / "1", {"step": 1}))
    saver.wait()
    if engine.context.rank == 0:
        (folder / "2.partial").write_text("in the way")  # a file where a folder must be
    saver.start(CheckpointInfo(folder / "2", {"step": 2}))
    train(engine, 1, 1)
    saver.wait()
    if engine.context.rank == 0:
        (folder / "2.partial").unlink()
    saver.start(CheckpointInfo(folder / "3", {"step": 3}))
    saver.wait()
    outcomes = saver.finished()
    engine.context.destroy()
    return outcomes


def test_a_save_that_fails_is_reported_on_all_ranks_and_costs_nothing(
    pool: RankPool, small_recipe: dict[str, Any], tmp_path: Path
) -> None:
    small_recipe["parallelism"]["dp"] = 2
    for outcomes in pool.run(2, fail_then_succeed_on_rank, small_recipe, tmp_path):
        errors = [outcome.error for outcome in outcomes]
        assert errors == [None, f"{tmp_path}/2.partial: not a directory", None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]
    assert verify_checkpoint_files(tmp_path / "1") == []


def save_beside_a_gpu_on_rank(mapping: dict[str, object], folder: Path) -> tuple[list[str], list[Any]]:
    """What the saver asks of a GPU that is said to be there."""
    engine = start_engine(mapping)
    saver = CheckpointSaver(engine.built.buckets, engine.optimizer, engine.context)
    asked: list[str] = []

    class Stream:
        device_type = "cuda"

        def synchronize(self) -> None:
            asked.append("stream.synchronize")

    stream = Stream()

    def current_stream(*_: object) -> Stream:
        asked.append("current_stream")
        return stream

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "current_stream", current_stream)
        patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        patch.setattr(torch.cuda, "synchronize", lambda *_: asked.append("synchronize"))
        saver.start(CheckpointInfo(folder / "1", {"step": 1}))
        saver.wait()
    outcomes = saver.finished()
    engine.context.destroy()
    return asked, [outcome.error for outcome in outcomes]


def test_beside_a_gpu_a_save_never_waits_for_the_stream_of_the_training(
    pool: RankPool, small_recipe: dict[str, Any], tmp_path: Path
) -> None:
    assert pool.run(1, save_beside_a_gpu_on_rank, small_recipe, tmp_path) == [([], [None])]
    assert verify_checkpoint_files(tmp_path / "1") == []
