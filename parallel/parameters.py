"""What a parameter is across ranks: its global name, which slices this rank holds, and who else holds a copy."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist
from torch import nn

from parallel.nanotron_import import import_nanotron
from parallel.process_groups import EngineContext

import_nanotron()

from nanotron import distributed as nanotron_dist  # noqa: E402
from nanotron.parallel.parameters import NanotronParameter  # noqa: E402
from nanotron.parallel.pipeline_parallel.utils import get_pp_rank_of  # noqa: E402
from nanotron.parallel.tied_parameters import (  # noqa: E402
    create_pg_for_tied_weights,
    create_tied_parameter,
    tie_parameters,
)

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Shard:
    """The part of a global tensor that a rank holds.

    Attributes:
        global_shape: shape of the whole tensor.
        pairs: (slices of the local tensor, slices of the global tensor) for every contiguous chunk.
    """

    global_shape: tuple[int, ...]
    pairs: tuple[tuple[Slices, Slices], ...]


def shard_of(parameter: torch.Tensor) -> Shard:
    """Where a nanotron parameter lies in its global tensor; the whole of it where it is not sharded."""
    if isinstance(parameter, NanotronParameter) and parameter.is_sharded:
        info = parameter.get_sharded_info()
        pairs = tuple((pair.local_slices, pair.global_slices) for pair in info.local_global_slices_pairs)
        return Shard(tuple(int(size) for size in info.unsharded_shape), pairs)
    everything = (slice(None),) * parameter.dim()
    return Shard(tuple(parameter.shape), ((everything, everything),))


def global_name(name: str, parameter: torch.Tensor) -> str:
    """The name a parameter has at every topology: for tied parameters that of the first of them."""
    if isinstance(parameter, NanotronParameter) and parameter.is_tied:
        return str(parameter.get_tied_info().name)
    return name


def named_parameters(model: nn.Module) -> Iterator[tuple[str, NanotronParameter]]:
    """Every parameter of this rank once, by its global name."""
    for name, parameter in model.named_parameters():
        yield global_name(name, parameter), parameter


def holders_of(parameter: NanotronParameter, rank: int) -> tuple[int, ...]:
    """World ranks of one model replica that hold the same values as `rank` does: itself alone unless tied."""
    if parameter.is_tied:
        return tuple(int(r) for r in parameter.get_tied_info().global_ranks)
    return (rank,)


def has_partial_gradient(parameter: NanotronParameter) -> bool:
    """Whether the gradients of the holders must be summed (each holder saw another part of the computation)."""
    return bool(parameter.is_tied and parameter.get_tied_info().reduce_op is not None)


def tie_across_ranks(
    model: nn.Module,
    context: EngineContext,
    tied_names: list[str],
    is_partial: Callable[[str], bool],
) -> None:
    """Mark what several ranks hold, with nanotron's own marks, and create the groups that synchronise it.

    Args:
        tied_names: parameters that are one and the same tensor (input embedding and output head), or none.
        is_partial: says of an unsharded parameter, by name, whether each tensor-parallel rank computes only a part
            of its gradient. With sequence parallelism (REDUCE_SCATTER) that is all of them. Per-head gains (QK-norm)
            are partial in both modes: nanotron marks them as needing no sum in ALL_REDUCE mode, and the copies drift.
    """
    if tied_names:
        tie_parameters(
            root_module=model,
            ties=[(name, (_rank_on_stage_of(name, model, context),)) for name in tied_names],
            parallel_context=context,
            reduce_op=torch_dist.ReduceOp.SUM,
        )
    tp_ranks = tuple(sorted(torch_dist.get_process_group_ranks(context.tp_pg)))
    for module_name, module in model.named_modules():
        for parameter_name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, NanotronParameter) and parameter.is_sharded:
                continue
            name = f"{module_name}.{parameter_name}"
            tied = create_tied_parameter(
                parameter=parameter,
                name=name,
                global_ranks=tp_ranks,
                reduce_op=torch_dist.ReduceOp.SUM if is_partial(name) else None,
                root_module=model,
            )
            setattr(module, parameter_name, tied)
    create_pg_for_tied_weights(root_module=model, parallel_context=context)


def _rank_on_stage_of(name: str, model: nn.Module, context: EngineContext) -> int:
    stage = get_pp_rank_of(name, module=model)
    expert_rank = nanotron_dist.get_rank(context.expert_pg)
    return int(context.world_rank_matrix[expert_rank, stage, context.dp_rank, context.tp_rank])


def replace_storage(model: nn.Module, storage: dict[str, torch.Tensor]) -> None:
    """Give every parameter the tensor of its global name, keeping nanotron's marks.

    The model is built on the meta device, where nothing is allocated or drawn; this is where its memory comes from.
    """
    marks = NanotronParameter.NANOTRON_PARAMETER_METADATA_ATTRIBUTE_NAME
    replaced: dict[str, NanotronParameter] = {}
    for module_name, module in model.named_modules():
        for parameter_name, old in list(module.named_parameters(recurse=False)):
            name = global_name(f"{module_name}.{parameter_name}", old)
            if name not in replaced:
                replaced[name] = NanotronParameter(tensor=storage[name])
                setattr(replaced[name], marks, getattr(old, marks))
            setattr(module, parameter_name, replaced[name])
