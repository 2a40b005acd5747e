"""Attention behind one function: flash-attn where it is installed and applies, torch's own kernels otherwise."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class AttentionInputs:
    """Who may look at whom in a micro-batch of B sequences of S tokens; built once, used by every layer.

    Attributes:
        mask: [B, 1, S, S] added to the scores (0 or -inf), or None for plain causal attention.
        cu_seqlens: int32 [documents + 1], offsets of the documents in the flattened [B * S], for flash kernels.
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
    position_ids: torch.Tensor,
    backend: AttentionBackend,
    dtype: torch.dtype,
    mask_documents: bool,
    device: torch.device,
) -> AttentionInputs:
    """What the layers' attention needs to know of a micro-batch, on the device.

    Args:
        position_ids: int64 [B, S] on the CPU, where counting documents waits for no device; they restart at 0 at every
            document.
        mask_documents: False lets attention cross document boundaries.
    """
    batch, length = position_ids.shape
    if not mask_documents:
        return AttentionInputs(None, None, length)
    if backend.takes_offsets:
        return AttentionInputs(None, _document_offsets(position_ids).to(device, non_blocking=True), length)
    position_ids = position_ids.to(device, non_blocking=True)
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


def why_no_flash_attention() -> str | None:
    """Why flash-attn (the extra `gpu`) cannot be used; None where its functions can be imported."""
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func  # noqa: F401
    except Exception as error:  # built for another torch, it raises whatever its loader meets
        if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn":
            return "flash-attn is not installed (extra `gpu`)"
        return f"flash-attn cannot be imported: {str(error).partition(chr(10))[0]}"
    return None


def torch_varlen_attn() -> Callable[..., Any] | None:
    """torch's function for sequences of different lengths; None where this torch has none that does what is needed."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"window_size", "enable_gqa"}  # the first release of the function had neither
    return varlen_attn if needed <= inspect.signature(varlen_attn).parameters.keys() else None


def choose_attention(
    requested: str, dtype: torch.dtype, device: torch.device, *, head_dim: int, deterministic: bool = False
) -> AttentionBackend:
    """The kernel for this run.

    Args:
        requested: `_attn_implementation` of the recipe; "sdpa" asks for torch's kernel, everything else for flash-attn
            where it can run, and for torch's `varlen_attn` where that can.
        deterministic: flash-attn's backward pass adds in a fixed order; torch's own kernels do as torch was told.
    """
    if requested == "sdpa":
        return AttentionBackend("sdpa", "the recipe asks for it", sdpa_attention)
    if device.type != "cuda":
        return AttentionBackend("sdpa", "flash-attn needs CUDA", sdpa_attention)
    if dtype not in (torch.bfloat16, torch.float16):
        return AttentionBackend("sdpa", f"flash-attn has no {str(dtype).removeprefix('torch.')} kernel", sdpa_attention)
    reason = why_no_flash_attention()
    if reason is None:
        function = partial(flash_attention, deterministic=deterministic)
        return AttentionBackend("flash_attention_2", "flash-attn is installed", function, True)
    varlen_attn, obstacle = torch_varlen_attn(), _why_no_varlen_attn(device, head_dim)
    if varlen_attn is None:
        obstacle = f"needs a newer torch than {torch.__version__}"
    if varlen_attn is None or obstacle is not None:
        return AttentionBackend("sdpa", f"{reason}, and torch's varlen_attn {obstacle}", sdpa_attention)
    function = partial(varlen_attention, varlen_attn=varlen_attn)
    return AttentionBackend("varlen_attn", f"torch's own; {reason}", function, True)


def _why_no_varlen_attn(device: torch.device, head_dim: int) -> str | None:
    """What keeps torch's flash kernel from a CUDA device in half precision; None where it can run."""
    if not torch.backends.cuda.is_flash_attention_available():
        return "needs a torch that was built with it"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0"
    if head_dim % 8 or head_dim > 256:
        return f"needs a head size that is a multiple of 8 up to 256, not {head_dim}"
    return None


def sdpa_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
    """torch's scaled_dot_product_attention, on every device.

    With a mask, CUDA has a fused kernel for grouped queries on few GPUs and torches only: elsewhere the scores of all
    pairs are computed, and kept for the backward pass in every layer.
    """
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


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: AttentionInputs, *, varlen_attn: Callable[..., Any]
) -> torch.Tensor:
    """torch's flash kernel (CUDA, half precision): documents as variable-length sequences."""
    if inputs.cu_seqlens is None:
        return sdpa_attention(q, k, v, inputs)  # for which torch has fused kernels
    out: torch.Tensor = varlen_attn(
        *(tensor.flatten(0, 1) for tensor in (q, k, v)),
        cu_seq_q=inputs.cu_seqlens,
        cu_seq_k=inputs.cu_seqlens,
        max_q=inputs.max_seqlen,
        max_k=inputs.max_seqlen,
        window_size=(-1, 0),  # causal
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.view(q.shape)
