"""Section `model`: the network, its initial weights and its number format."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nanotron_recipes.schema.section import (
    NoEffect,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    null_means,
)

AttentionImplementation = Literal[
    "auto", "flash_attention_2", "sdpa", "flex_attention", "ring_flash_triton", "llama3_ring_attention"
]


class Architecture(Section):
    """Section `model.model_config`: the shape of the network, in the words of nanotron's Qwen2Config."""

    vocab_size: PositiveInt
    """Tokens of the model, at least as many as the tokenizer has. The matrices may have more rows (see
    `make_vocab_size_divisible_by`), which take no part in the softmax."""

    hidden_size: PositiveInt
    """Width of the residual stream."""

    intermediate_size: PositiveInt
    """Width of the gated MLP."""

    num_hidden_layers: PositiveInt
    """Number of decoder layers."""

    num_attention_heads: PositiveInt
    """Query heads; each has hidden_size / num_attention_heads channels."""

    num_key_value_heads: PositiveInt
    """Key and value heads, each shared by an equal group of query heads. Null: as many as query heads. Fewer make the
    key-value cache smaller at little loss."""

    hidden_act: Literal["silu"] = "silu"
    """Activation of the MLP's gate."""

    rms_norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in RMSNorm, against division by zero."""

    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding's wavelengths. Raise it with the sequence length."""

    no_rope_layer: Annotated[int, Field(ge=1)] | None = None
    """Every n-th layer has no position embedding (NoPE): layer i, from 0, where (i + 1) is a multiple of n. Null: every
    layer has RoPE. 4 in SmolLM3, which helps beyond the trained length."""

    tie_word_embeddings: bool = False
    """Use the token embedding as output matrix too. True for small models, where the vocabulary dominates."""

    max_position_embeddings: PositiveInt = 2048
    """Longest sequence that the exported configuration states. It does not limit training."""

    bos_token_id: NonNegativeInt | None = 1
    """Token that begins a text; exported."""

    eos_token_id: NonNegativeInt | None = 2
    """Token that ends a document; exported, and generation stops at it."""

    pad_token_id: NonNegativeInt | None = None
    """Token that fills batches up after training; exported."""

    use_qk_norm: bool = False
    """Normalise queries and keys per head (RMSNorm with a gain) before RoPE, as Qwen3 does. Steadies training at high
    learning rates. Together with `no_rope_layer` no class of transformers fits, so such a model cannot be exported."""

    z_loss_enabled: bool = False
    """Add z_loss_coefficient · mean(log² Z) to the loss, Z the softmax's denominator. Turn on where logits drift."""

    z_loss_coefficient: NonNegativeFloat = 1e-4
    """Weight of the z-loss."""

    use_doc_masking: bool = Field(default=False, alias="_use_doc_masking")
    """Let a token attend only to its own document, and count positions from the document's start."""

    attn_implementation: Annotated[AttentionImplementation, null_means("auto")] = Field(
        default="auto", alias="_attn_implementation"
    )
    """Preferred attention kernel: flash_attention_2 or auto = flash-attn where it is installed and applies, else
    torch's own flash kernel (varlen_attn) where it applies, else sdpa, torch's scaled_dot_product_attention; what runs
    and why is printed. sdpa takes document masks as a number for each pair of tokens, which may cost gigabytes a layer
    on a GPU."""

    attention_bias: bool = False
    """Biases in the attention projections. Only false can be trained."""

    moe_config: dict[str, Any] | None = None
    """Mixture of experts. Only null can be trained."""

    sliding_window_size: PositiveInt | None = None
    """Attend to the last so many tokens only. Only null can be trained."""

    rope_scaling: dict[str, Any] | None = None
    """Stretching of RoPE to longer sequences. Only null can be trained; raise rope_theta instead."""

    rope_interleaved: bool = False
    """Rotate neighbouring channels rather than halves of a head. Only false can be trained."""

    flex_attention_mask: str | None = None
    """Mask for flex attention. Only null can be trained."""

    initializer_range: Annotated[float, NoEffect("model.init_method.std sets the initial weights")] = 0.02
    """Hugging Face's name for the standard deviation of the initial weights."""

    is_llama_config: Annotated[bool, NoEffect("there is one architecture here")] = False
    """nanotron's mark of a LlamaConfig."""

    is_qwen2_config: Annotated[bool, NoEffect("there is one architecture here")] = False
    """nanotron's mark of a Qwen2Config."""

    pretraining_tp: Annotated[int, NoEffect("parallelism.tp is the tensor parallel size")] = 1
    """A record of the tensor parallel size."""

    use_cache: Annotated[bool, NoEffect("training keeps no key-value cache; exports are always written with one")] = (
        True
    )
    """Keep keys and values while generating."""

    fused_rms_norm: Annotated[bool, NoEffect("RMSNorm is torch's own")] = Field(default=False, alias="_fused_rms_norm")
    """Use flash-attn's fused RMSNorm."""

    fused_rotary_emb: Annotated[bool, NoEffect("RoPE is written in torch")] = Field(
        default=False, alias="_fused_rotary_emb"
    )
    """Use flash-attn's fused rotary embedding."""

    use_qkv_packed: Annotated[bool, NoEffect("queries, keys and values are one projection in any case")] = Field(
        default=False, alias="_use_qkv_packed"
    )
    """Hand queries, keys and values to the kernel as one tensor."""

    ring_attn_heads_k_stride: Annotated[int | None, NoEffect("it tunes ring attention only")] = None
    """Key heads that ring attention exchanges at a time."""

    @model_validator(mode="before")
    @classmethod
    def _one_key_head_per_query_head(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("num_key_value_heads") is None and "num_attention_heads" in value:
            return {**value, "num_key_value_heads": value["num_attention_heads"]}
        return value

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rope_layers(self) -> tuple[bool, ...]:
        """For each layer whether it has RoPE."""
        every = self.no_rope_layer
        return tuple(every is None or (layer + 1) % every != 0 for layer in range(self.num_hidden_layers))


class InitMethod(Section):
    """Section `model.init_method`: normally distributed initial weights."""

    std: PositiveFloat = 0.02
    """Standard deviation of every matrix. About 1/√hidden_size: 0.02 suits 2,048, and is far too small for 64."""

    scaling_method: Literal["NONE", "NUM_LAYERS", "LAYER_INDEX"] = "NUM_LAYERS"
    """What the std of the output projections (o_proj, down_proj) is divided by. NUM_LAYERS: √(2·layers). LAYER_INDEX:
    √(2·(layer + 1)), layers counted from 0. NONE: nothing."""


class Model(Section):
    """What is trained."""

    architecture: Architecture = Field(alias="model_config")
    """The shape of the network."""

    init_method: InitMethod = InitMethod()
    """How weights begin."""

    dtype: Annotated[Literal["float32", "bfloat16"], null_means("bfloat16")] = "bfloat16"
    """Number format of weights and activations; the optimizer keeps its own in float32. float32 on CPUs, many of which
    emulate bfloat16."""

    make_vocab_size_divisible_by: PositiveInt = 1
    """Pad the vocabulary to a multiple of this, whatever tp is. Raise it where tp does not divide the vocabulary."""

    ddp_bucket_cap_mb: PositiveInt = 25
    """Mebibytes of gradients that are reduced over the replicas at a time. Larger where the network is far."""
