"""The same model by its names here and by its names in transformers.

Our fused parameters are stacks of rows of theirs: q over k over v, gate over up. `parameter_map` lists that once, and
both directions read it; nothing here copies more than one tensor. RoPE rotates halves (not interleaved pairs) on both
sides, so no rows are permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.arithmetic import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix, parameter_shapes
from nanotron_recipes.errors import UserError, user_error
from nanotron_recipes.recipe import Recipe

if TYPE_CHECKING:
    import torch

SMOLLM3, LLAMA, QWEN3 = "SmolLM3ForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"
MODEL_TYPES = {SMOLLM3: "smollm3", LLAMA: "llama", QWEN3: "qwen3"}


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of one of our parameters, which are the whole of a Hugging Face tensor."""

    hf_name: str
    start: int
    stop: int


@dataclass(frozen=True)
class ParameterMap:
    """One of our parameters: its global shape without vocabulary padding, and the tensors it is a stack of."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class TokenIds:
    """Special tokens to write into the Hugging Face configuration; None where the model has no such token."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def hf_class(recipe: Recipe) -> str:
    """Name of the transformers class that computes what this model computes.

    Raises UserError for QK-norm together with layers without RoPE, which no class has.
    """
    architecture = recipe.model.architecture
    every_layer_has_rope = all(architecture.rope_layers)
    if architecture.use_qk_norm:
        if not every_layer_has_rope:
            raise UserError(
                f"model.model_config.use_qk_norm: true with no_rope_layer: {architecture.no_rope_layer} has no Hugging "
                f"Face class; expected no_rope_layer: null ({QWEN3}) or use_qk_norm: false ({SMOLLM3})"
            )
        return QWEN3
    return LLAMA if every_layer_has_rope else SMOLLM3


def parameter_map(recipe: Recipe) -> list[ParameterMap]:
    """Every parameter of the model in the order of the forward pass, with the Hugging Face tensors it consists of."""
    architecture = recipe.model.architecture
    head_dim, ffn = architecture.head_dim, architecture.intermediate_size
    q_rows, kv_rows = architecture.num_attention_heads * head_dim, architecture.num_key_value_heads * head_dim
    renamed = {EMBEDDING: "model.embed_tokens.weight", FINAL_NORM: "model.norm.weight", LM_HEAD: "lm_head.weight"}
    stacks: dict[str, tuple[tuple[str, int], ...]] = {}
    for layer in range(architecture.num_hidden_layers):
        ours, theirs = layer_prefix(layer), f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm", "mlp.down_proj"):
            renamed[f"{ours}{name}.weight"] = f"{theirs}{name}.weight"
        for name in ("q_norm", "k_norm", "o_proj"):
            renamed[f"{ours}attn.{name}.weight"] = f"{theirs}self_attn.{name}.weight"
        stacks[f"{ours}attn.qkv_proj.weight"] = (
            (f"{theirs}self_attn.q_proj.weight", q_rows),
            (f"{theirs}self_attn.k_proj.weight", kv_rows),
            (f"{theirs}self_attn.v_proj.weight", kv_rows),
        )
        stacks[f"{ours}mlp.gate_up_proj.weight"] = (
            (f"{theirs}mlp.gate_proj.weight", ffn),
            (f"{theirs}mlp.up_proj.weight", ffn),
        )
    return [
        ParameterMap(name, shape, _pieces(stacks.get(name) or ((renamed[name], shape[0]),)))
        for name, shape in parameter_shapes(recipe, padded=False).items()
    ]


def _pieces(stack: tuple[tuple[str, int], ...]) -> tuple[Piece, ...]:
    pieces, start = [], 0
    for hf_name, rows in stack:
        pieces.append(Piece(hf_name, start, start + rows))
        start += rows
    return tuple(pieces)


def hf_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the Hugging Face file by name; a tied model has no lm_head.weight."""
    return {
        piece.hf_name: (piece.stop - piece.start, *entry.shape[1:])
        for entry in parameter_map(recipe)
        for piece in entry.pieces
    }


def split_to_hf(entry: ParameterMap, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors in one of our global tensors: views, padding rows of the vocabulary left out."""
    rows_and_columns = (tensor.shape[0], *tensor.shape[1:])
    if rows_and_columns[1:] != entry.shape[1:] or rows_and_columns[0] < entry.shape[0]:
        raise UserError(f"{entry.name}: shape {list(tensor.shape)}, expected {list(entry.shape)} as the recipe says")
    return [(piece.hf_name, tensor[piece.start : piece.stop]) for piece in entry.pieces]


def fuse_from_hf(entry: ParameterMap, read: Callable[[str], torch.Tensor], rows: int) -> torch.Tensor:
    """Our global tensor from Hugging Face's; `rows` >= entry.shape[0], those beyond (vocabulary padding) are zero."""
    import torch

    tensors = [read(piece.hf_name) for piece in entry.pieces]
    if rows > entry.shape[0]:
        tensors.append(tensors[0].new_zeros(rows - entry.shape[0], *entry.shape[1:]))
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def hf_config(recipe: Recipe, *, dtype: str, token_ids: TokenIds, transformers_version: str) -> dict[str, Any]:
    """Contents of config.json (transformers 5 keys) for `hf_class(recipe)`, weights stored in `dtype`."""
    architecture = recipe.model.architecture
    name = hf_class(recipe)
    config: dict[str, Any] = {
        "architectures": [name],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": token_ids.bos,
        "dtype": dtype,
        "eos_token_id": token_ids.eos,
        "hidden_act": architecture.hidden_act,
        "hidden_size": architecture.hidden_size,
        "initializer_range": recipe.model.init_method.std,
        "intermediate_size": architecture.intermediate_size,
        "max_position_embeddings": architecture.max_position_embeddings,
        "model_type": MODEL_TYPES[name],
        "num_attention_heads": architecture.num_attention_heads,
        "num_hidden_layers": architecture.num_hidden_layers,
        "num_key_value_heads": architecture.num_key_value_heads,
        "pad_token_id": token_ids.pad,
        "rms_norm_eps": architecture.rms_norm_eps,
        "rope_parameters": {"rope_theta": architecture.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "transformers_version": transformers_version,
        "use_cache": True,
        "vocab_size": architecture.vocab_size,
    }
    return dict(sorted((config | _class_keys(name, recipe)).items()))


def _class_keys(name: str, recipe: Recipe) -> dict[str, Any]:
    architecture = recipe.model.architecture
    if name == LLAMA:
        return {"head_dim": architecture.head_dim, "mlp_bias": False}
    layer_types = ["full_attention"] * architecture.num_hidden_layers
    no_window = {"layer_types": layer_types, "sliding_window": None, "use_sliding_window": False}
    if name == QWEN3:
        return no_window | {"head_dim": architecture.head_dim}
    return no_window | {
        "mlp_bias": False,
        # The name is inverted in transformers: 1 is a layer with RoPE, 0 one without.
        "no_rope_layers": [int(rope) for rope in architecture.rope_layers],
        "no_rope_layer_interval": architecture.no_rope_layer,
    }


def no_rope_layer_of(no_rope_layers: list[int], source: str) -> int | None:
    """Our `no_rope_layer` (every n-th layer has no RoPE; None: all have) for transformers' list, where 1 means RoPE.

    Raises UserError, which names `source`, where the layers without RoPE are not every n-th.
    """
    if all(no_rope_layers):
        return None
    interval = no_rope_layers.index(0) + 1
    if [int((layer + 1) % interval != 0) for layer in range(len(no_rope_layers))] != [
        int(bool(x)) for x in no_rope_layers
    ]:
        raise user_error(
            "expected a 0 (no RoPE) at every n-th layer only", source=source, key="no_rope_layers", value=no_rope_layers
        )
    return interval


def token_ids_of(recipe: Recipe, tokenizer_ids: Mapping[str, int] | None = None) -> TokenIds:
    """Special tokens for the configuration: the tokenizer's where it has them, else the recipe's that the vocabulary
    contains (the usual defaults lie far beyond a small one)."""
    architecture = recipe.model.architecture

    def pick(kind: str, fallback: int | None) -> int | None:
        chosen = (tokenizer_ids or {}).get(kind, fallback)
        return chosen if chosen is not None and 0 <= chosen < architecture.vocab_size else None

    return TokenIds(
        bos=pick("bos", architecture.bos_token_id),
        eos=pick("eos", architecture.eos_token_id),
        pad=pick("pad", architecture.pad_token_id),
    )
