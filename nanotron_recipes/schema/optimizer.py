"""Section `optimizer`: AdamW and its learning rate."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from nanotron_recipes.schema.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Section,
    null_means,
)


def _no_other_type(value: Any) -> Any:
    """In Python true equals 1, and so does 1.0."""
    if value in (0, 1) and type(value) is not int:
        raise PydanticCustomError("literal_error", "not a whole number", {"expected": "0 or 1"})
    return value


class OptimizerFactory(Section):
    """Section `optimizer.optimizer_factory`."""

    name: Literal["adamW"] = "adamW"
    """The optimizer: Adam with decoupled weight decay."""

    adam_beta1: Fraction = 0.9
    """Decay of the mean of gradients."""

    adam_beta2: Fraction = 0.95
    """Decay of the mean of squared gradients. Nearer to 1 (0.999) for small batches and short runs."""

    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the mean square, against division by zero."""

    torch_adam_is_fused: bool = True
    """Update all parameters in one kernel."""


class LearningRateScheduler(Section):
    """Section `optimizer.learning_rate_scheduler`: warm-up, a constant stretch, decay, the minimum. See schedule.py."""

    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate. The most important number of a recipe; smaller models want larger ones."""

    lr_warmup_steps: NonNegativeInt = 0
    """Steps of the warm-up. A few per cent of the run, 2,000 for long ones."""

    lr_warmup_style: Annotated[Literal["linear", "constant"], null_means("linear")] = "linear"
    """linear: rise from 0, so that step 1 trains with 0; constant: the peak from the first step."""

    lr_decay_style: Annotated[Literal["linear", "cosine", "1-sqrt"], null_means("linear")] = "linear"
    """Shape of the decay: a line, half a cosine, or 1 − √, which falls fast and then slowly."""

    lr_decay_starting_step: NonNegativeInt | None = None
    """Steps before the decay begins; the rate is constant from the warm-up to here (warm-up, stable, decay). Null:
    right after the warm-up."""

    lr_decay_steps: NonNegativeInt | None = None
    """Length of the decay. Null: train_steps − lr_warmup_steps, as in nanotron, whatever lr_decay_starting_step is."""

    min_decay_lr: NonNegativeFloat | None = None
    """Learning rate at and after the end of the decay. Null: the peak, that is no decay at all, as in nanotron."""


class Optimizer(Section):
    """How gradients become weights."""

    optimizer_factory: OptimizerFactory = OptimizerFactory()
    """The optimizer and its constants."""

    learning_rate_scheduler: LearningRateScheduler = LearningRateScheduler()
    """The learning rate of each step."""

    weight_decay: NonNegativeFloat = 0.1
    """Each step multiplies a decayed parameter by 1 − learning rate · weight_decay."""

    weight_decay_exclude_named_params: list[str] = Field(default_factory=lambda: [".*token_embedding.*"])
    """Regular expressions; a parameter whose global name one of them matches from its start is not decayed. Each must
    match a parameter."""

    clip_grad: PositiveFloat | None = 1.0
    """Scale the gradient down to this norm where it is longer. Null: never."""

    accumulate_grad_in_fp32: bool = True
    """Sum the micro-batches' gradients in float32, whatever the model's dtype. That is done in any case: false has no
    effect."""

    zero_stage: Annotated[Literal[0, 1], BeforeValidator(_no_other_type)] = 0
    """1: each replica keeps and updates only its part of the optimizer's state; same result, less memory."""
