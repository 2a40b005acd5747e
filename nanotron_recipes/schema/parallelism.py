"""Section `parallelism`: how one training is spread over ranks. None of it changes what is learnt."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from nanotron_recipes.schema.section import NoEffect, PositiveInt, Section, null_means


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class Parallelism(Section):
    """The grid of ranks, dp·pp·tp."""

    dp: PositiveInt | Literal["auto"] = "auto"
    """Data parallel replicas; auto takes all ranks that pp and tp leave. The global batch is divided among them."""

    pp: PositiveInt = 1
    """Pipeline stages: consecutive layers on different ranks. Raise when a layer fits a GPU but the model does not."""

    tp: PositiveInt = 1
    """Tensor parallel ranks that share every layer; they talk in every layer, so keep them inside a node."""

    pp_engine: Annotated[Literal["1f1b", "afab"], null_means("afab"), BeforeValidator(_lower)] = "1f1b"
    """Order of micro-batches in the pipeline: one forward, one backward (needs at least pp − 1 micro-batches, keeps the
    activations of pp of them), or all forward, then all backward (keeps those of all)."""

    tp_mode: Annotated[Literal["ALL_REDUCE", "REDUCE_SCATTER"], null_means("ALL_REDUCE"), BeforeValidator(_upper)] = (
        "ALL_REDUCE"
    )
    """Between tensor parallel layers, hold whole activations on every rank, or a slice of the sequence on each
    (REDUCE_SCATTER: less memory, and sequence_length must be divisible by tp)."""

    tp_linear_async_communication: Annotated[bool, null_means(False)] = False
    """Overlap the communication of tensor parallel layers with their matrix products."""

    tp_recompute_allgather: Annotated[bool, NoEffect("nanotron 0.4's layers have no such choice")] = True
    """Gather a layer's input again in the backward pass instead of keeping it."""

    recompute_layer: bool = False
    """Keep only each layer's input and compute the rest again in the backward pass. nanotron's word for `recompute:
    full`; where both are given they must agree."""

    recompute: Annotated[Literal["none", "selective", "full"], null_means("none"), BeforeValidator(_lower)] = "none"
    """What the backward pass computes again instead of keeping it; losses stay the same. selective: the norms, SwiGLU,
    and the gathering of REDUCE_SCATTER, which save most for their cost: no matrix product runs twice, and two fifths of
    a layer's activations are saved for 5 % more time (135M parameters). Attention's inside is kept: its kernels store
    no scores, and would have to run again. With tp_linear_async_communication three of a layer's four products run
    twice all the same. full: all but each layer's input, for a fifth to a third more time. Raise when activations do
    not fit, before lowering the micro-batch."""

    context_parallel_size: PositiveInt = 1
    """Ranks that share one sequence. More than 1 is not available yet."""

    expert_parallel_size: PositiveInt = 1
    """Ranks that share the experts of a mixture. More than 1 is not available."""

    moe_layer_recompute: Annotated[bool, NoEffect("there are no mixtures of experts here")] = False
    """Recompute the layers of a mixture of experts."""

    @model_validator(mode="before")
    @classmethod
    def _recompute_under_both_names(cls, values: Any) -> Any:
        """Give the one of `recompute_layer` and `recompute` that is missing the other's meaning."""
        if not isinstance(values, dict):
            return values
        if "recompute" not in values:
            return {**values, "recompute": "full" if values.get("recompute_layer") is True else "none"}
        if "recompute_layer" not in values:
            return {**values, "recompute_layer": _lower(values["recompute"]) == "full"}
        return values
