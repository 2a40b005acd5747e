"""AdamW on flat buffers, with ZeRO-1, the gradient norm and clipping.

nanotron's `ZeroDistributedOptimizer` and `clip_grad_norm` walk over every parameter in Python, twice a step, and know
no weight-decay groups. On flat buffers the whole update is a few fused calls; see benchmarks/results for both side by
side.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist

from parallel.buckets import Bucket, Slot
from parallel.process_groups import EngineContext

NORM_PIECE = 4096
"""Elements of a norm that are added up one after the other."""


@dataclass(frozen=True)
class AdamWSettings:
    """AdamW's constants (Loshchilov & Hutter, arXiv:1711.05101); the learning rate is given at each step."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    fused: bool


class FlatAdamW:
    """Updates the owned float32 range of every bucket and spreads the new values to the model's parameters."""

    def __init__(
        self, buckets: list[Bucket], context: EngineContext, settings: AdamWSettings, shard_over_dp: bool
    ) -> None:
        self._buckets = buckets
        self._context = context
        self._shard_over_dp = shard_over_dp
        # With ZeRO-1 the parts of the data-parallel ranks add up to the replica; without, the first replica speaks for
        # all. One sum over the world gives every rank the same bits, and so the same clipping factor.
        speaks = shard_over_dp or context.dp_rank == 0
        self._counted = [
            (bucket, start, end)
            for bucket in buckets
            for start, end in bucket.ranges(lambda slot: slot.counted and speaks)
        ]
        self._adamw = torch.optim.AdamW(
            [
                self._group(_is_decayed, settings.weight_decay),
                self._group(_is_not_decayed, 0.0),
            ],
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=settings.fused,
            # Keeps the counter on the device, where a skipped update has to leave it alone.
            capturable=not settings.fused and context.device.type == "cuda",
        )

    @property
    def context(self) -> EngineContext:
        """The ranks among which the parameters are spread."""
        return self._context

    def _group(self, wanted: Callable[[Slot], bool], weight_decay: float) -> dict[str, object]:
        vectors = []
        for bucket in self._buckets:
            for start, end in bucket.ranges(wanted):
                vector = bucket.master[start:end].detach()
                vector.grad = bucket.owned_gradients[start:end]
                vectors.append(vector)
        return {"params": vectors, "weight_decay": weight_decay}

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """2-norm of the whole model's gradient (float32 scalar, the same bits on every rank of a replica)."""
        sums = [sum_of_squares(bucket.owned_gradients[a:b]) for bucket, a, b in self._counted]
        total = torch.stack(sums).sum() if sums else torch.zeros((), device=self._context.device)
        torch_dist.all_reduce(total, group=self._context.world_pg)
        return total.sqrt()

    @torch.no_grad()
    def clip(self, grad_norm: torch.Tensor, max_norm: float) -> None:
        """Scale the gradients so that their norm is at most `max_norm`; no host synchronisation."""
        scale = (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        for bucket in self._buckets:
            bucket.owned_gradients.mul_(scale)

    @torch.no_grad()
    def step(self, lr: float, skipped: torch.Tensor | None = None) -> None:
        """Update with learning rate `lr`, then bring the new values to the parameters of every replica.

        Args:
            skipped: float32 scalar on the device, the same on every rank; 1 leaves weights, moments and counter as
                they are, whatever the gradients hold, 0 updates. The host never waits for it.
        """
        for group in self._adamw.param_groups:
            group["lr"] = lr
        if skipped is None or self._adamw.defaults["fused"]:
            self._adamw.found_inf = skipped  # type: ignore[attr-defined]  # torch's fused kernel looks at it
            self._adamw.step()
        else:
            self._step_unfused(skipped)
        self.publish()

    def _step_unfused(self, skipped: torch.Tensor) -> None:
        """Torch's other kernels know no skipping: update, and take the old values back where it is skipped."""
        self._ensure_state()
        touched = [part for vector, state in self._adamw.state.items() for part in (vector, *state.values())]
        before = [part.clone() for part in touched]
        self._adamw.step()
        for part, old in zip(touched, before, strict=True):
            torch.where(skipped > 0, old, part, out=part)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the float32 values to the model's dtype and, with ZeRO-1, gather what other replicas own."""
        for bucket in self._buckets:
            if bucket.parameters.dtype != torch.float32:
                bucket.owned_parameters.copy_(bucket.master)
        if self._shard_over_dp and self._context.dp_pg.size() > 1:
            for bucket in self._buckets:
                part = bucket.owned_parameters
                part = part if self._context.device.type == "cuda" else part.clone()
                torch_dist.all_gather_into_tensor(bucket.parameters, part, group=self._context.dp_pg)

    @torch.no_grad()
    def adopt_parameters(self) -> None:
        """Take the model's own values as the float32 values, where a checkpoint has no finer ones."""
        for bucket in self._buckets:
            if bucket.parameters.dtype != torch.float32:
                bucket.master.copy_(bucket.owned_parameters)

    def state_vectors(self) -> list[tuple[Bucket, int, int, dict[str, torch.Tensor]]]:
        """(bucket, start, end within the owned range, {exp_avg, exp_avg_sq, step}); allocates the state if needed."""
        self._ensure_state()
        found = []
        for group, wanted in zip(self._adamw.param_groups, (_is_decayed, _is_not_decayed), strict=True):
            vectors = iter(group["params"])
            for bucket in self._buckets:
                for start, end in bucket.ranges(wanted):
                    found.append((bucket, start, end, self._adamw.state[next(vectors)]))
        return found

    def num_updates(self) -> int:
        """AdamW's counter: how many updates the moments have seen."""
        steps = {int(state["step"]) for state in self._adamw.state.values()}
        assert len(steps) <= 1, "all vectors are updated together"
        return steps.pop() if steps else 0

    def set_num_updates(self, count: int) -> None:
        """Set AdamW's counter, as read from a checkpoint."""
        self._ensure_state()
        for state in self._adamw.state.values():
            state["step"].fill_(count)

    def _ensure_state(self) -> None:
        if self._adamw.state:
            return
        for group in self._adamw.param_groups:
            on_device = group["fused"] or group["capturable"]
            for vector in group["params"]:
                self._adamw.state[vector] = {
                    "step": torch.zeros((), dtype=torch.float32, device=vector.device if on_device else "cpu"),
                    "exp_avg": torch.zeros_like(vector),
                    "exp_avg_sq": torch.zeros_like(vector),
                }


def sum_of_squares(vector: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of a float32 vector, a float32 scalar.

    Taken piece by piece: on the CPU torch adds up a norm one by one, and 10 million elements are wrong by 3e-4.
    """
    whole = vector.numel() - vector.numel() % NORM_PIECE
    norms = torch.linalg.vector_norm(vector[:whole].view(-1, NORM_PIECE), dim=1)
    rest = torch.linalg.vector_norm(vector[whole:])
    return norms.square().sum() + rest.square()


def _is_decayed(slot: Slot) -> bool:
    return slot.decayed


def _is_not_decayed(slot: Slot) -> bool:
    return not slot.decayed
