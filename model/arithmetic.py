"""How many parameters, floating-point operations and bytes a recipe's model has, counted from the recipe alone."""

from __future__ import annotations

import re
from math import prod
from typing import Literal

from nanotron_recipes.parameters import parameter_names
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.topology import padded_vocab_size

EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
LM_HEAD = "model.lm_head.pp_block.weight"
FINAL_NORM = "model.final_layer_norm.pp_block.weight"

FlopsFormula = Literal["6n", "causal", "full"]
"""Which matrix products of a training step are counted; see `flops_per_token`."""

BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2}


def layer_prefix(layer: int) -> str:
    """Prefix of the parameter names of decoder layer `layer` (0-based), with the final dot."""
    return f"model.decoder.{layer}.pp_block."


def parameter_shapes(recipe: Recipe, *, padded: bool = True) -> dict[str, tuple[int, ...]]:
    """Global (unsharded) shape of every parameter by its checkpoint name, in the order of the forward pass.

    `padded`: the vocabulary's rows as the engine holds them (a multiple of make_vocab_size_divisible_by); False: the
    rows that mean a token. A tied model has no `lm_head` entry.
    """
    architecture = recipe.model.architecture
    hidden, ffn, head_dim = architecture.hidden_size, architecture.intermediate_size, architecture.head_dim
    heads, kv_heads = architecture.num_attention_heads, architecture.num_key_value_heads
    vocabulary = padded_vocab_size(recipe) if padded else architecture.vocab_size
    shape_of = {
        EMBEDDING: (vocabulary, hidden),
        FINAL_NORM: (hidden,),
        LM_HEAD: (vocabulary, hidden),
        "input_layernorm.weight": (hidden,),
        "attn.qkv_proj.weight": ((heads + 2 * kv_heads) * head_dim, hidden),
        "attn.q_norm.weight": (head_dim,),
        "attn.k_norm.weight": (head_dim,),
        "attn.o_proj.weight": (hidden, heads * head_dim),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_up_proj.weight": (2 * ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    in_layer = re.compile(re.escape(layer_prefix(0)).replace("0", r"\d+"))
    return {name: shape_of[in_layer.sub("", name)] for name in parameter_names(recipe)}


def num_parameters(recipe: Recipe, *, padded: bool = False) -> int:
    """Number of parameters, a tied embedding counted once; `padded` also counts the rows that pad the vocabulary."""
    return sum(prod(shape) for shape in parameter_shapes(recipe, padded=padded).values())


def num_non_embedding_parameters(recipe: Recipe) -> int:
    """Number of parameters without the token embedding and without the output head."""
    shapes = parameter_shapes(recipe, padded=False)
    return sum(prod(shape) for name, shape in shapes.items() if name not in (EMBEDDING, LM_HEAD))


def weight_bytes(recipe: Recipe, dtype: str | None = None, *, padded: bool = False) -> int:
    """Bytes of one copy of the weights in `dtype` ("float32", "bfloat16"; default: the recipe's model.dtype)."""
    return num_parameters(recipe, padded=padded) * BYTES_OF_DTYPE[dtype or recipe.model.dtype]


def flops_per_token(recipe: Recipe, formula: FlopsFormula, sequence_length: int | None = None) -> int:
    """Floating-point operations of forward and backward per trained token (a multiply-add counts two).

    Three conventions are in use; the same run differs by a fifth between them, so a figure always names its own:

    - "6n": 6 N, the weights' products alone: 2 N forward, 4 N backward (Kaplan et al. 2020, arXiv:2001.08361, 2.1). N
      is every parameter but the input embedding of an untied model, which is a look-up; a tied one is the head's.
    - "full": adds 12 L h s, the attention's two products over all s x s pairs, three times for forward and backward
      (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B; also how nanotron's own get_flops counts).
    - "causal": adds 6 L h s, since half of the pairs are masked (Dao 2023, FlashAttention-2, arXiv:2307.08691, 4.1).

    L layers, h = heads x head size, s = `sequence_length` (default: tokens.sequence_length). Intra-document masks and
    recomputed activations are not accounted for: model FLOPs, not hardware FLOPs.
    """
    architecture = recipe.model.architecture
    weights = num_parameters(recipe)
    if not architecture.tie_word_embeddings:
        weights -= architecture.vocab_size * architecture.hidden_size
    length = sequence_length or recipe.tokens.sequence_length
    pairs = architecture.num_hidden_layers * architecture.num_attention_heads * architecture.head_dim * length
    attention = {"6n": 0, "causal": 6 * pairs, "full": 12 * pairs}
    return 6 * weights + attention[formula]


def mfu(
    recipe: Recipe,
    tokens_per_second: float,
    peak_flops: float,
    formula: FlopsFormula,
    sequence_length: int | None = None,
) -> float:
    """Model FLOPs utilisation, a fraction (1.0 = the peak).

    `tokens_per_second` and `peak_flops` (floating-point operations per second) must be of the same set of devices.
    """
    return tokens_per_second * flops_per_token(recipe, formula, sequence_length) / peak_flops
