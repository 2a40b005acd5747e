"""Attention behind one function: flash-attn where it is installed and applies, torch's own kernel otherwise."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class AttentionInputs:
    """Who may look at whom in a micro-batch of B sequences of S tokens; built once, used by every layer.

    Attributes:
        mask: [B, 1, S, S] added to the scores (0 or -inf), or None for plain causal attention.
        cu_seqlens: int32 [documents + 1], offsets of the documents in the flattened [B * S], for flash-attn.
        max_seqlen: tokens of the longest piece that attends within itself, an upper bound.
    """

    mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    max_seqlen: int


AttentionFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionInputs], torch.Tensor]
"""(q [B, S, heads, head_dim], k and v [B, S, kv_heads, head_dim], inputs) -> [B, S, heads, head_dim]."""


@dataclass(frozen=True)
class AttentionBackend:
    """A kernel and why it was chosen; the reason is shown at the start of a run.

    Attributes:
        takes_offsets: documents are given as offsets instead of a mask.
    """

    name: str
    reason: str
    function: AttentionFunction
    takes_offsets: bool = False


def attention_inputs(
    position_ids: torch.Tensor, backend: AttentionBackend, dtype: torch.dtype, mask_documents: bool
) -> AttentionInputs:
    """What the layers' attention needs to know of a micro-batch.

    Args:
        position_ids: int64 [B, S], restarting at 0 at every document.
        mask_documents: False lets attention cross document boundaries.
    """
    batch, length = position_ids.shape
    if not mask_documents:
        return AttentionInputs(None, None, length)
    if backend.takes_offsets:
        return AttentionInputs(None, _document_offsets(position_ids), length)
    documents = (position_ids == 0).cumsum(dim=1)
    same_document = documents.unsqueeze(2) == documents.unsqueeze(1)
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    mask = torch.zeros(batch, length, length, dtype=dtype, device=position_ids.device)
    mask.masked_fill_(~(same_document & causal), float("-inf"))
    return AttentionInputs(mask.unsqueeze(1), None, length)


def _document_offsets(position_ids: torch.Tensor) -> torch.Tensor:
    batch, length = position_ids.shape
    starts = position_ids == 0
    starts[:, 0] = True
    offsets = starts.flatten().nonzero().flatten().to(torch.int32)
    end = torch.tensor([batch * length], dtype=torch.int32, device=position_ids.device)
    return torch.cat((offsets, end))


def flash_attention_is_installed() -> bool:
    """Whether the optional package flash-attn (extra `gpu`) can be imported."""
    return importlib.util.find_spec("flash_attn") is not None


def choose_attention(
    requested: str, dtype: torch.dtype, device: torch.device, *, deterministic: bool = False
) -> AttentionBackend:
    """The kernel for this run.

    Args:
        requested: `_attn_implementation` of the recipe; "sdpa" asks for torch's kernel, everything else for flash-attn
            where it can run.
        deterministic: flash-attn's backward pass adds in a fixed order; torch's own kernels do as torch was told.
    """
    if requested == "sdpa":
        return AttentionBackend("sdpa", "the recipe asks for it", sdpa_attention)
    if device.type != "cuda":
        return AttentionBackend("sdpa", "flash-attn needs CUDA", sdpa_attention)
    if dtype not in (torch.bfloat16, torch.float16):
        return AttentionBackend("sdpa", f"flash-attn has no {str(dtype).removeprefix('torch.')} kernel", sdpa_attention)
    if not flash_attention_is_installed():
        return AttentionBackend("sdpa", "flash-attn is not installed (extra `gpu`)", sdpa_attention)
    function = partial(flash_attention, deterministic=deterministic)
    return AttentionBackend("flash_attention_2", "flash-attn is installed", function, True)


def sdpa_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
    """torch's scaled_dot_product_attention, on every device."""
    q_heads, k_heads, v_heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
    mask = inputs.mask
    assert mask is not None or inputs.cu_seqlens is None, "inputs were built for a kernel that takes offsets"
    out = F.scaled_dot_product_attention(
        q_heads, k_heads, v_heads, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out.transpose(1, 2)


def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: AttentionInputs, *, deterministic: bool = False
) -> torch.Tensor:
    """flash-attn's fused kernel (CUDA, half precision): documents as variable-length sequences."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if inputs.cu_seqlens is None:
        return flash_attn_func(q, k, v, causal=True, deterministic=deterministic)
    out = flash_attn_varlen_func(
        *(tensor.flatten(0, 1) for tensor in (q, k, v)),
        cu_seqlens_q=inputs.cu_seqlens,
        cu_seqlens_k=inputs.cu_seqlens,
        max_seqlen_q=inputs.max_seqlen,
        max_seqlen_k=inputs.max_seqlen,
        causal=True,
        deterministic=deterministic,
    )
    return out.view(q.shape)
