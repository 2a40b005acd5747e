"""One training step on nanotron's engine: micro-batches through the pipeline, gradients summed, weights updated."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist

from data.batch import MicroBatch as MicroBatchArrays
from data.batch import StepBatch
from launch.train.step_clock import StepClock
from model.build import BuiltModel, build_model
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.topology import Topology
from parallel.gradients import GradientSync
from parallel.nanotron_import import import_nanotron
from parallel.optimizer import AdamWSettings, FlatAdamW
from parallel.p2p import flush_sends
from parallel.process_groups import EngineContext

import_nanotron()

from nanotron.parallel.pipeline_parallel.engine import (  # noqa: E402
    AllForwardAllBackwardPipelineEngine,
    OneForwardOneBackwardPipelineEngine,
    PipelineEngine,
)
from nanotron.parallel.pipeline_parallel.tensor_pointer import TensorPointer  # noqa: E402

PIPELINE_ENGINES: dict[str, type[PipelineEngine]] = {
    "1f1b": OneForwardOneBackwardPipelineEngine,
    "afab": AllForwardAllBackwardPipelineEngine,
}

_SAVE = float(1 << 30)
"""What a wish for a checkpoint adds to the number of ranks that were asked to stop: more than there are ranks."""


@dataclass(frozen=True)
class StepResult:
    """Figures of one optimizer step over the whole global batch, the same on every rank.

    Attributes:
        loss: mean negative log-likelihood of the valid targets, nats per token (without z-loss).
        grad_norm: 2-norm of the gradient before clipping.
        stop_requested: whether any rank was asked to stop.
        save_requested: whether the first rank's clock asks for a checkpoint.
        skipped: whether the update was left out, because the loss or the gradient norm was not finite.
    """

    loss: float
    grad_norm: float
    stop_requested: bool = False
    save_requested: bool = False
    skipped: bool = False


class TrainingEngine:
    """A rank's part of the model with everything that trains it; its weights are still to be drawn or loaded."""

    def __init__(self, recipe: Recipe, topology: Topology, context: EngineContext) -> None:
        sharded = recipe.optimizer.zero_stage > 0
        self.recipe = recipe
        self.topology = topology
        self.context = context
        self.built: BuiltModel = build_model(recipe, context)
        self.gradients = GradientSync(self.built.module, self.built.buckets, context, sharded)
        self.optimizer = FlatAdamW(self.built.buckets, context, adamw_settings(recipe), sharded)
        self.clock = StepClock(context, self.built.module.model.p2p)
        self._pipeline = PIPELINE_ENGINES[recipe.parallelism.pp_engine]()

    def train_step(
        self,
        batch: StepBatch,
        lr: float,
        stop_requested: Callable[[], bool] = lambda: False,
        save_requested: bool = False,
    ) -> StepResult:
        """Forward, backward and update for this rank's micro-batches of one global batch.

        Where the loss or the gradient norm is not finite, on whichever rank, no rank updates anything.

        Args:
            stop_requested: says at the end of the step whether this rank was asked to stop; all ranks learn of it with
                the loss.
            save_requested: whether a checkpoint is due by the clock; one rank may ask.
        """
        count = len(batch.micro_batches)
        # nanotron divides every micro-batch's loss by their number; what is wanted is the sum over the valid targets
        # of the global batch divided by their number.
        self.built.current.loss_scale = count / batch.num_valid_targets
        self.clock.begin()
        self.gradients.begin(count)
        outputs = self._pipeline.train_batch_iter(
            model=self.built.module,
            pg=self.context.pp_pg,
            batch=({"micro_batch": self._prepare(arrays)} for arrays in batch.micro_batches),
            nb_microbatches=count,
            grad_accumulator=None,
        )
        self.clock.end()  # from here on this rank waits for others
        self.gradients.finish()
        grad_norm = self.optimizer.grad_norm()
        if self.recipe.optimizer.clip_grad is not None:
            self.optimizer.clip(grad_norm, self.recipe.optimizer.clip_grad)
        totals = self._sum_over_world(outputs, float(stop_requested()) + _SAVE * save_requested, grad_norm)
        self.optimizer.step(lr, skipped=(~torch.isfinite(totals)).any().float())
        flush_sends(self.built.module.model.p2p)
        # The host waits for the device here, when it has queued everything; before at most for copies of micro-batches.
        nll_sum, flags, norms = totals.tolist()
        saves, stops = divmod(flags, _SAVE)
        skipped = not (math.isfinite(nll_sum) and math.isfinite(norms))
        return StepResult(nll_sum / batch.num_valid_targets, float(grad_norm), stops > 0, saves > 0, skipped)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatchArrays]) -> float:
        """Sum of the negative log-likelihood over the valid targets that all replicas were given, in nats."""
        outputs = [self.built.module(micro_batch=self._prepare(arrays)) for arrays in micro_batches]
        flush_sends(self.built.module.model.p2p)
        return float(self._sum_over_world(outputs)[0])

    def _prepare(self, arrays: MicroBatchArrays) -> object:
        tokens = torch.from_numpy(arrays.tokens).to(self.context.device, non_blocking=True)
        return self.built.prepare(
            {
                "input_ids": tokens[:, :-1],
                "target_ids": tokens[:, 1:],
                "target_mask": torch.from_numpy(arrays.target_mask),
                "position_ids": torch.from_numpy(arrays.position_ids),
            }
        )

    def _sum_over_world(
        self,
        outputs: Sequence[dict[str, torch.Tensor | TensorPointer]],
        flag: float = 0.0,
        norm: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sums over all ranks, float64 [3] on the device: what the last stages computed, a flag, and the norms.

        One tensor rank speaks for all of them about the loss. The sum of the norms says whether all are finite.
        """
        mine = [output["nll_sum"] for output in outputs] if self.context.tp_rank == 0 else []
        parts = [part.double() for part in mine if isinstance(part, torch.Tensor)]
        zero = torch.zeros((), dtype=torch.float64, device=self.context.device)
        nll_sum = torch.stack(parts).sum() if parts else zero
        totals = torch.stack((nll_sum, torch.full_like(zero, flag), zero if norm is None else norm.double()))
        torch_dist.all_reduce(totals, group=self.context.world_pg)
        return totals


def adamw_settings(recipe: Recipe) -> AdamWSettings:
    """The optimizer section as `FlatAdamW` wants it."""
    factory = recipe.optimizer.optimizer_factory
    return AdamWSettings(
        beta1=factory.adam_beta1,
        beta2=factory.adam_beta2,
        eps=factory.adam_eps,
        weight_decay=recipe.optimizer.weight_decay,
        fused=factory.torch_adam_is_fused,
    )
