"""From a recipe to a model on this rank: built on the meta device, given memory, drawn or loaded."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from model.attention import AttentionBackend, choose_attention
from model.llama import LlamaForTraining, Wiring
from model.micro_batch import CurrentMicroBatch, MicroBatch, prepare_micro_batch
from nanotron_recipes.parameters import is_decayed
from nanotron_recipes.recipe import Recipe
from parallel.buckets import Bucket, allocate, plan_buckets
from parallel.initialization import initialize
from parallel.nanotron_import import import_nanotron
from parallel.parameters import replace_storage, tie_across_ranks
from parallel.partition import build_stages
from parallel.process_groups import EngineContext, single_process_context

import_nanotron()

from nanotron.parallel.tensor_parallel.nn import TensorParallelLinearMode  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class BuiltModel:
    """A rank's part of the model.

    Attributes:
        module: the pipeline stage(s) of this rank; called with a `MicroBatch`.
        buckets: the memory of its parameters and gradients.
        current: where the loss scale of a step is set.
        attention: the kernel in use and why.
    """

    recipe: Recipe
    context: EngineContext
    module: LlamaForTraining
    buckets: list[Bucket]
    current: CurrentMicroBatch
    attention: AttentionBackend

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.recipe.model.dtype]

    def prepare(self, arrays: dict[str, torch.Tensor]) -> MicroBatch:
        """Bring input_ids, target_ids, target_mask, position_ids ([B, S] on the CPU) to the device."""
        shape = self.recipe.model.architecture
        return prepare_micro_batch(
            arrays,
            head_dim=shape.head_dim,
            rope_theta=shape.rope_theta,
            mask_documents=shape.use_doc_masking,
            backend=self.attention,
            dtype=self.dtype,
            device=self.context.device,
        )


def build_on_meta(recipe: Recipe, context: EngineContext) -> LlamaForTraining:
    """The modules of this rank's stages with parameters that have shapes and marks but no memory."""
    wiring = Wiring(
        recipe=recipe,
        tp_pg=context.tp_pg,
        attention=choose_attention(
            recipe.model.architecture.attn_implementation,
            DTYPES[recipe.model.dtype],
            context.device,
            head_dim=recipe.model.architecture.head_dim,
            deterministic=recipe.general.deterministic,
        ),
        current=CurrentMicroBatch(),
    )
    module: LlamaForTraining = build_stages(
        lambda: LlamaForTraining(context, wiring), context, DTYPES[recipe.model.dtype], torch.device("meta")
    )
    sequence_parallel = wiring.tp_mode is TensorParallelLinearMode.REDUCE_SCATTER
    tie_across_ranks(
        module,
        context,
        tied_names=module.tied_names,
        is_partial=lambda name: sequence_parallel or name.endswith((".q_norm.weight", ".k_norm.weight")),
    )
    return module


def build_model(recipe: Recipe, context: EngineContext, *, for_training: bool = True) -> BuiltModel:
    """A rank's part of the model with memory but without values: `initialize_weights` or a checkpoint follows.

    Args:
        for_training: False leaves out gradients and the float32 master copy: weights only.
    """
    module = build_on_meta(recipe, context)
    buckets = plan_buckets(
        module,
        context,
        is_decayed=decay_rule(recipe),
        bucket_bytes=recipe.model.ddp_bucket_cap_mb * 2**20,
        shard_over_dp=recipe.optimizer.zero_stage > 0,
    )
    replace_storage(module, allocate(buckets, DTYPES[recipe.model.dtype], context.device, for_training))
    wiring = module.wiring
    return BuiltModel(recipe, context, module, buckets, wiring.current, wiring.attention)


def initialize_weights(built: BuiltModel) -> None:
    """Draw the initial weights of step 0, the same at every topology."""
    initialize(built.buckets, built.recipe.general.seed, draw_rule(built.recipe))


def decay_rule(recipe: Recipe) -> Callable[[str], bool]:
    """Weight decay by global parameter name: everything but `weight_decay_exclude_named_params`."""
    return lambda name: is_decayed(name, recipe.optimizer.weight_decay_exclude_named_params)


def draw_rule(recipe: Recipe) -> Callable[[str, tuple[int, ...], torch.Generator], torch.Tensor]:
    """Initial values by name: norms are 1, matrices normal with `init_method.std`; padding rows are 0.

    With scaling_method NUM_LAYERS (nanotron's default) the projections that write to the residual stream have
    std / sqrt(2 * layers), with LAYER_INDEX std / sqrt(2 * (layer + 1)) (GPT-2, section 2.3, and its variants).
    """
    method, shape = recipe.model.init_method, recipe.model.architecture

    def draw(name: str, global_shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        if len(global_shape) == 1:
            return torch.ones(global_shape, dtype=torch.float32)
        std = method.std
        layer = re.search(r"\.decoder\.(\d+)\.", name)
        if layer and name.endswith((".o_proj.weight", ".down_proj.weight")):
            if method.scaling_method == "NUM_LAYERS":
                std /= (2 * shape.num_hidden_layers) ** 0.5
            elif method.scaling_method == "LAYER_INDEX":
                std /= (2 * (int(layer.group(1)) + 1)) ** 0.5
        values = torch.zeros(global_shape, dtype=torch.float32)
        over_vocabulary = "token_embedding" in name or "lm_head" in name
        rows = values[: shape.vocab_size] if over_vocabulary else values
        rows.normal_(0.0, std, generator=generator)
        return values

    return draw


@torch.no_grad()
def logits_from_tensors(
    recipe: Recipe, tensors: Iterable[tuple[str, torch.Tensor]], token_ids: torch.Tensor
) -> torch.Tensor:
    """Logits of our own model with the given weights, in this process alone, on the CPU.

    Args:
        tensors: (global name, value) of every parameter.
        token_ids: int64 [B, S]; each row is one document.

    Returns:
        float32 [B, S, vocabulary] without padding.
    """
    alone = recipe.model_copy(
        update={"parallelism": recipe.parallelism.model_copy(update={"dp": 1, "pp": 1, "tp": 1})},
    )
    with single_process_context(torch.device("cpu")) as context:
        built = build_model(alone, context, for_training=False)
        load_named(built, tensors)
        positions = torch.arange(token_ids.shape[1]).expand_as(token_ids)
        micro_batch = built.prepare(
            {
                "input_ids": token_ids,
                "target_ids": token_ids,
                "target_mask": torch.ones_like(token_ids, dtype=torch.bool),
                "position_ids": positions,
            }
        )
        built.current.set(micro_batch)
        logits = built.module.model()
        return logits.view(*token_ids.shape, -1)[..., : recipe.model.architecture.vocab_size].float().contiguous()


def load_named(built: BuiltModel, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy global tensors (name, value) into this rank's parameters; names that it does not hold are ignored."""
    slots = {slot.name: (bucket, slot) for bucket in built.buckets for slot in bucket.slots}
    for name, value in tensors:
        if name not in slots:
            continue
        bucket, slot = slots[name]
        local = slot.view(bucket.parameters)
        for local_slices, global_slices in slot.shard.pairs:
            local[local_slices].copy_(value[global_slices])
