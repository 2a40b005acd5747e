"""Faults to plant in a training engine, to show what the guards do about them; importable by the ranks of the pool."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist

from data.batch import StepBatch
from data.plan import DataPlan
from launch.train.engine import TrainingEngine
from parallel.buckets import Bucket


def nan_gradient(engine: TrainingEngine, steps: tuple[int, ...]) -> None:
    """In these steps the last rank's gradients of one bucket are NaN before anything is reduced."""
    launch, poisoned = engine.gradients._launch, engine.built.buckets[-1]

    def launch_poisoned(bucket: Bucket) -> None:
        if bucket is poisoned and engine.context.rank == torch_dist.get_world_size() - 1:
            for slot in bucket.slots:
                slot.view(bucket.gradients).fill_(torch.nan)
        launch(bucket)

    _in_steps(engine, steps, engine.gradients, "_launch", launch_poisoned)


def nan_loss(engine: TrainingEngine, steps: tuple[int, ...]) -> None:
    """In these steps the last micro-batch's loss is NaN where it is computed; its gradient is not."""
    train = engine._pipeline.train_batch_iter

    def train_poisoned(**arguments: Any) -> Any:
        outputs = train(**arguments)
        if isinstance(outputs[-1]["nll_sum"], torch.Tensor):
            outputs[-1]["nll_sum"] = outputs[-1]["nll_sum"] * torch.nan
        return outputs

    _in_steps(engine, steps, engine._pipeline, "train_batch_iter", train_poisoned)


def _in_steps(
    engine: TrainingEngine, steps: tuple[int, ...], owner: object, name: str, faulty: Callable[..., Any]
) -> None:
    """Put `faulty` in the place of a method during these steps of the engine, counted from 1."""
    train_step, sound, taken = engine.train_step, getattr(owner, name), [0]

    def counted(*arguments: Any, **keywords: Any) -> Any:
        taken[0] += 1
        setattr(owner, name, faulty if taken[0] in steps else sound)
        return train_step(*arguments, **keywords)

    engine.train_step = counted  # type: ignore[method-assign]


def nan_now_and_then(engine: TrainingEngine) -> None:
    """Step 2 is not finite, and all steps from 5 on."""
    nan_gradient(engine, steps=(2, *range(5, 100)))


def slow_rank(engine: TrainingEngine, rank: int = 1, seconds: float = 0.15) -> None:
    """This rank sleeps in the forward pass of every step."""
    if engine.context.rank != rank:
        return
    forward = engine.built.module.forward

    def sleepy(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(seconds)
        return forward(*arguments, **keywords)

    engine.built.module.forward = sleepy


def flipped_bit(
    engine: TrainingEngine, step: int = 4, rank: int = 1, suffix: str = "2.pp_block.mlp.down_proj.weight"
) -> None:
    """At the end of this step the lowest bit of one number differs on one rank."""
    train_step, taken = engine.train_step, [0]

    def flip_after(*arguments: Any, **keywords: Any) -> Any:
        result = train_step(*arguments, **keywords)
        taken[0] += 1
        if (taken[0], engine.context.rank) == (step, rank):
            for bucket in engine.built.buckets:
                for slot in bucket.slots:
                    if slot.name.endswith(suffix):
                        flip_lowest_bit(slot.view(bucket.parameters))
        return result

    engine.train_step = flip_after  # type: ignore[method-assign]


def flip_lowest_bit(values: torch.Tensor, place: int = -1) -> None:
    """Change the last bit of one of the values, in place."""
    bits = values.view(-1).view(torch.int32 if values.element_size() == 4 else torch.int16)
    bits[place] ^= 1


def left_out_collective(engine: TrainingEngine) -> None:
    """In step 3 rank 1 goes on without the others where the losses are summed: all of them wait for ever."""
    if engine.context.rank == 1:
        zeros = torch.zeros(3, dtype=torch.float64)
        _in_steps(engine, (3,), engine, "_sum_over_world", lambda *arguments: zeros)


def bad_batch(number: int) -> Callable[..., StepBatch]:
    """A `DataPlan.step` whose batch of this number, whichever step reads it, has tokens that nobody can predict."""
    sound = DataPlan.step

    def step_with_bad_batch(plan: DataPlan, step: int, **keywords: int) -> StepBatch:
        batch = sound(plan, step, **keywords)
        if plan._skipped.batch_of(step) != number:
            return batch
        bad = [
            dataclasses.replace(part, tokens=(7 * part.tokens + 3 * np.roll(part.tokens, 1, axis=1) + 1) % 320)
            for part in batch.micro_batches
        ]
        return dataclasses.replace(batch, micro_batches=bad)

    return step_with_bad_batch
