"""The model: Llama-style blocks on nanotron's tensor- and pipeline-parallel layers.

Hidden states are [B * S, hidden], one sequence after the other: with REDUCE_SCATTER nanotron splits dimension 0 over
the tensor-parallel ranks between the layers, and attention finds the tokens of a sequence side by side. Parameter
names are nanotron's, so that patterns in published recipes fit.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model.arithmetic import EMBEDDING, LM_HEAD
from model.attention import AttentionBackend
from model.micro_batch import CurrentMicroBatch, MicroBatch
from model.pointwise import rms_norm, swiglu
from model.recomputation import kept, recomputed
from model.rope import apply_rope
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.topology import padded_vocab_size
from parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel.nanotron_import import import_nanotron
from parallel.p2p import build_p2p
from parallel.process_groups import EngineContext
from parallel.row_linear import RowLinear

import_nanotron()

from nanotron.models import NanotronModel  # noqa: E402
from nanotron.parallel.parameters import NanotronParameter  # noqa: E402
from nanotron.parallel.pipeline_parallel.block import PipelineBlock  # noqa: E402
from nanotron.parallel.pipeline_parallel.tensor_pointer import TensorPointer  # noqa: E402
from nanotron.parallel.tensor_parallel.nn import (  # noqa: E402
    TensorParallelColumnLinear,
    TensorParallelEmbedding,
    TensorParallelLinearMode,
)


@dataclass(frozen=True)
class Wiring:
    """What every block needs besides the recipe: its process group, kernels, and the micro-batch in flight."""

    recipe: Recipe
    tp_pg: Any
    attention: AttentionBackend
    current: CurrentMicroBatch

    @property
    def tp_mode(self) -> TensorParallelLinearMode:
        return TensorParallelLinearMode[self.recipe.parallelism.tp_mode]

    def column_linear(self, outputs: int, chunks: tuple[int, ...] | None = None) -> TensorParallelColumnLinear:
        """hidden -> outputs, split by rows; `chunks` are split one by one (q, k, v)."""
        return TensorParallelColumnLinear(
            in_features=self.recipe.model.architecture.hidden_size,
            out_features=outputs,
            pg=self.tp_pg,
            mode=self.tp_mode,
            bias=False,
            async_communication=self._async_communication,
            contiguous_chunks=chunks,
        )

    def row_linear(self, inputs: int) -> RowLinear:
        """inputs -> hidden, split by columns."""
        return RowLinear(
            in_features=inputs,
            out_features=self.recipe.model.architecture.hidden_size,
            pg=self.tp_pg,
            mode=self.tp_mode,
            bias=False,
            async_communication=self._async_communication,
        )

    @property
    def _async_communication(self) -> bool:
        # nanotron's row layer refuses it in ALL_REDUCE mode; a single rank has nothing to overlap.
        wanted = self.recipe.parallelism.tp_linear_async_communication
        return bool(wanted and self.tp_pg.size() > 1 and self.tp_mode is TensorParallelLinearMode.REDUCE_SCATTER)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = NanotronParameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class Embedding(nn.Module):
    """Token ids of the current micro-batch -> hidden states."""

    def __init__(self, wiring: Wiring) -> None:
        super().__init__()
        self.current = wiring.current
        self.token_embedding = TensorParallelEmbedding(
            num_embeddings=padded_vocab_size(wiring.recipe),
            embedding_dim=wiring.recipe.model.architecture.hidden_size,
            pg=wiring.tp_pg,
            mode=wiring.tp_mode,
        )

    def forward(self) -> dict[str, torch.Tensor]:
        return {"hidden_states": self.token_embedding(self.current.value.input_ids)}


class Attention(nn.Module):
    """Grouped-query attention; rotary positions on all layers but the NoPE ones."""

    def __init__(self, wiring: Wiring, layer: int) -> None:
        super().__init__()
        shape = wiring.recipe.model.architecture
        tp = wiring.tp_pg.size()
        self.head_dim = shape.head_dim
        self.num_heads = shape.num_attention_heads // tp
        self.num_kv_heads = shape.num_key_value_heads // tp
        self.has_rope = shape.rope_layers[layer]
        self.backend = wiring.attention
        q_size, kv_size = shape.num_attention_heads * self.head_dim, shape.num_key_value_heads * self.head_dim
        self.qkv_proj = wiring.column_linear(q_size + 2 * kv_size, chunks=(q_size, kv_size, kv_size))
        self.o_proj = wiring.row_linear(q_size)
        if shape.use_qk_norm:
            self.q_norm = RMSNorm(self.head_dim, shape.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, shape.rms_norm_eps)
        self.use_qk_norm = shape.use_qk_norm

    def forward(self, qkv: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """From the output of `qkv_proj` [B * S, (heads + 2 * kv_heads) * head_dim] on."""
        qkv = qkv.view(*micro_batch.position_ids.shape, -1, self.head_dim)
        if self.use_qk_norm:
            q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=-2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=-2)
        else:
            qk, v = qkv.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=-2)
        if self.has_rope:
            qk = apply_rope(qk, micro_batch.rope)
        q, k = qk.split((self.num_heads, self.num_kv_heads), dim=-2)
        out = self.backend.function(q, k, v, micro_batch.attention)
        return self.o_proj(out.flatten(2).flatten(0, 1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, wiring: Wiring) -> None:
        super().__init__()
        size = wiring.recipe.model.architecture.intermediate_size
        self.gate_up_proj = wiring.column_linear(2 * size, chunks=(size, size))
        self.down_proj = wiring.row_linear(size)

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """From the output of `gate_up_proj` on."""
        return self.down_proj(swiglu(gate_up))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, wiring: Wiring, layer: int) -> None:
        super().__init__()
        shape = wiring.recipe.model.architecture
        self.current = wiring.current
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.attn = Attention(wiring, layer)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(wiring)
        self.recompute: str = wiring.recipe.parallelism.recompute

    def forward(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        # The micro-batch is an argument: when the layer is recomputed, another one is current.
        call = recomputed if self.recompute == "full" else kept
        return {"hidden_states": call(self._layer, hidden_states, self.current.value)}

    def _layer(self, hidden_states: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        # Each part begins with what is cheap to compute again and ends with a matrix product, which is not run again.
        call = recomputed if self.recompute == "selective" else kept
        qkv = call(self._qkv, hidden_states)
        hidden_states = hidden_states + self.attn(qkv, micro_batch)
        gate_up = call(self._gate_up, hidden_states)
        return hidden_states + call(self.mlp, gate_up)

    def _qkv(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.attn.qkv_proj(self.input_layernorm(hidden_states))

    def _gate_up(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.mlp.gate_up_proj(self.post_attention_layernorm(hidden_states))


class LossBlock(nn.Module):
    """Sum of the losses over the valid targets of the micro-batch, from float32 logits split over the vocabulary."""

    def __init__(self, wiring: Wiring) -> None:
        super().__init__()
        self.wiring = wiring
        shape = wiring.recipe.model.architecture
        self.vocab_size = shape.vocab_size
        self.z_loss_coefficient = shape.z_loss_coefficient if shape.z_loss_enabled else 0.0

    def forward(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        micro_batch = self.wiring.current.value
        logits = mask_padding(logits.float(), self.vocab_size, self.wiring.tp_pg)
        nll, z_loss = vocab_parallel_cross_entropy(
            logits, micro_batch.target_ids, self.wiring.tp_pg, self.z_loss_coefficient
        )
        valid = micro_batch.target_mask
        nll_sum = (nll * valid).sum()
        loss = nll_sum + (z_loss * valid).sum() if self.z_loss_coefficient else nll_sum
        return {"loss": loss * self.wiring.current.loss_scale, "nll_sum": nll_sum.detach()}


def mask_padding(logits: torch.Tensor, vocab_size: int, tp_pg: Any) -> torch.Tensor:
    """Set the columns of this rank's logits that are no real tokens to -inf: padding never enters the softmax."""
    shard = logits.shape[-1]
    num_real = vocab_size - tp_pg.rank() * shard
    if num_real >= shard:
        return logits
    is_padding = torch.arange(shard, device=logits.device) >= num_real
    return logits.masked_fill(is_padding, float("-inf"))


class LlamaBlocks(nn.Module):
    """The pipeline graph; every rank holds all blocks, but only those of its stage are built."""

    def __init__(self, context: EngineContext, wiring: Wiring) -> None:
        super().__init__()
        self.p2p = build_p2p(context)
        shape = wiring.recipe.model.architecture

        def block(builder: Any, inputs: set[str], outputs: set[str], /, **arguments: Any) -> PipelineBlock:
            return PipelineBlock(
                p2p=self.p2p,
                module_builder=builder,
                module_kwargs=arguments,
                module_input_keys=inputs,
                module_output_keys=outputs,
            )

        hidden = {"hidden_states"}
        self.token_position_embeddings = block(Embedding, set(), hidden, wiring=wiring)
        self.decoder = nn.ModuleList(
            block(DecoderLayer, hidden, hidden, wiring=wiring, layer=layer) for layer in range(shape.num_hidden_layers)
        )
        self.final_layer_norm = block(RMSNorm, {"x"}, {"x"}, size=shape.hidden_size, eps=shape.rms_norm_eps)
        self.lm_head = block(wiring.column_linear, {"x"}, {"logits"}, outputs=padded_vocab_size(wiring.recipe))

    def forward(self) -> torch.Tensor | TensorPointer:
        """Logits [B * S, vocabulary / tp] of the current micro-batch on the last stage, a pointer to it elsewhere."""
        hidden = self.token_position_embeddings()
        for layer in self.decoder:
            hidden = layer(**hidden)
        x = self.final_layer_norm(x=hidden["hidden_states"])["x"]
        return self.lm_head(x=x)["logits"]


class LlamaForTraining(NanotronModel):
    """Micro-batch -> loss, called by nanotron's pipeline engine on every stage."""

    def __init__(self, context: EngineContext, wiring: Wiring) -> None:
        super().__init__()
        self.parallel_context = context
        self.wiring = wiring
        self.model = LlamaBlocks(context, wiring)
        self.loss = PipelineBlock(
            p2p=self.model.p2p,
            module_builder=LossBlock,
            module_kwargs={"wiring": wiring},
            module_input_keys={"logits"},
            module_output_keys={"loss", "nll_sum"},
        )

    def forward(self, micro_batch: MicroBatch) -> dict[str, torch.Tensor | TensorPointer]:
        self.wiring.current.set(micro_batch)
        return self.loss(logits=self.model())

    def init_model_randomly(self, config: Any) -> None:
        """Required by nanotron; weights are drawn by `parallel.initialization` instead."""
        raise RuntimeError("weights are drawn by parallel.initialization.initialize")

    def get_block_compute_costs(self) -> dict[Any, int]:
        """Multiply-adds per token, by which nanotron balances the pipeline stages."""
        shape = self.wiring.recipe.model.architecture
        attention = shape.hidden_size * shape.head_dim * 2 * (shape.num_attention_heads + shape.num_key_value_heads)
        return {
            DecoderLayer: attention + 3 * shape.hidden_size * shape.intermediate_size,
            self.model.lm_head.module_builder: padded_vocab_size(self.wiring.recipe) * shape.hidden_size,
        }

    @property
    def tied_names(self) -> list[str]:
        """Parameters that are one tensor, first the one that names it."""
        return [EMBEDDING, LM_HEAD] if self.wiring.recipe.model.architecture.tie_word_embeddings else []
