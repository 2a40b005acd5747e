"""Faults to plant in a training engine, to show what the guards do about them; importable by the ranks of the pool."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as torch_dist

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

    def counted(*arguments: Any) -> Any:
        taken[0] += 1
        setattr(owner, name, faulty if taken[0] in steps else sound)
        return train_step(*arguments)

    engine.train_step = counted  # type: ignore[method-assign]
