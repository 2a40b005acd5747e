"""Gradient synchronisation of one step."""

from typing import Any

import pytest
import torch.distributed as torch_dist

from launch.train.engine import TrainingEngine
from launch.train.parity import compare_copies, start_engine
from launch.train.synthetic import synthetic_batch
from parallel.rank_pool import RankFailure, RankPool


def several_buckets(recipe: dict[str, Any]) -> None:
    """0.7M parameters on two replicas, in buckets of 1 MiB."""
    recipe["parallelism"]["dp"] = 2
    recipe["model"]["ddp_bucket_cap_mb"] = 1
    recipe["model"]["model_config"]["hidden_size"] = 192


class SlowHandle:
    """A reduction that is done only when it is waited for."""

    def __init__(self, start: Any) -> None:
        self._start = start
        self.is_done = False

    def wait(self) -> None:
        self._start()
        self.is_done = True


def late_reductions_on_rank(mapping: dict[str, object]) -> tuple[int, int, bool]:
    """Every bucket's sum is put off until its handle is waited for; (handles, buckets, whether all were waited for)."""
    engine = start_engine(mapping)
    sync, handles = engine.gradients, []

    def launch_late(bucket: Any) -> None:
        handle = SlowHandle(lambda: torch_dist.all_reduce(bucket.gradients, group=engine.context.dp_pg))
        handles.append(handle)
        sync._handles.append(handle)

    sync._launch = launch_late  # type: ignore[method-assign]
    train_once(engine)
    unequal, _ = compare_copies(engine)
    engine.context.destroy()
    all_done = all(handle.is_done for handle in handles)
    return len(handles), len(engine.built.buckets), all_done and not unequal


def train_once(engine: TrainingEngine) -> None:
    batch = synthetic_batch(engine.recipe, engine.topology, 1, engine.context.dp_rank)
    engine.train_step(batch, 1e-3)


def test_every_buckets_handle_is_waited_for(pool: RankPool, small_recipe: dict[str, Any]) -> None:
    """nanotron waits for the last one only."""
    several_buckets(small_recipe)
    for handles, buckets, all_done in pool.run(2, late_reductions_on_rank, small_recipe):
        assert handles == buckets > 1
        assert all_done


def overlap_on_rank(mapping: dict[str, object]) -> tuple[list[int], bool]:
    """(order in which buckets are launched, whether one was before the backward pass had ended)."""
    engine = start_engine(mapping)
    sync, order, waiting = engine.gradients, [], []
    launch = sync._launch

    def note(bucket: Any) -> None:
        order.append([bucket is other for other in engine.built.buckets].index(True))
        waiting.append(sum(sync._waiting))
        launch(bucket)

    sync._launch = note  # type: ignore[method-assign]
    train_once(engine)
    engine.context.destroy()
    return order, waiting[0] > 0


def test_buckets_are_reduced_in_order_while_the_backward_pass_goes_on(
    pool: RankPool, small_recipe: dict[str, Any]
) -> None:
    several_buckets(small_recipe)
    for order, overlaps in pool.run(2, overlap_on_rank, small_recipe):
        assert order == list(range(len(order))) and len(order) > 1
        assert overlaps


def forget_a_backward_on_rank(mapping: dict[str, object]) -> None:
    engine = start_engine(mapping)
    engine.gradients.begin(2)
    engine.gradients.finish()


def test_a_missing_backward_pass_is_noticed(small_recipe: dict[str, Any], pool: RankPool) -> None:
    with pytest.raises(RankFailure, match="backward passes without a gradient"):
        pool.run(1, forget_a_backward_on_rank, small_recipe)


def bucket_order_on_rank(mapping: dict[str, object]) -> tuple[int, list[set[str]]]:
    """The stage, and what the buckets hold, in their order."""
    engine = start_engine(mapping)
    names = [{slot.name for slot in bucket.slots} for bucket in engine.built.buckets]
    stage = engine.context.pp_rank
    engine.context.destroy()
    return stage, names


def test_tied_embeddings_wait_for_nobody_and_keep_nobody_waiting(pool: RankPool, small_recipe: dict[str, Any]) -> None:
    """Their gradient is the first of the last stage's backward pass, and the last of the first stage's."""
    several_buckets(small_recipe)
    small_recipe["parallelism"]["pp"] = 2
    stages = dict(pool.run(4, bucket_order_on_rank, small_recipe))
    (tied,) = set.intersection(*(set.union(*names) for names in stages.values()))
    assert stages[0][-1] == stages[1][0] == {tied} and len(stages[0]) > 2
