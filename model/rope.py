"""Rotary position embedding in the half-split layout of Hugging Face's Llama (Su et al., arXiv:2104.09864)."""

from typing import Any, NamedTuple

import torch


class RopeTable(NamedTuple):
    """Of every position's angles the cosines [B, S, 1, head_dim], each twice, and the sines [B, S, 1, head_dim / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor


def rope_table(position_ids: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> RopeTable:
    """Angles are computed in float32 (position * theta^(-2i/head_dim)) and then rounded to `dtype`.

    Args:
        position_ids: int64 [B, S].
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.unsqueeze(-1).float() * theta**-exponents
    angles = angles.unsqueeze(2)
    cos = angles.cos().to(dtype)
    return RopeTable(torch.cat((cos, cos), dim=-1), angles.sin().to(dtype))


def apply_rope(x: torch.Tensor, table: RopeTable) -> torch.Tensor:
    """Rotate x [B, S, heads, head_dim]: dimension i is paired with i + head_dim / 2."""
    return _Rotation.apply(x, *table)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: nothing but the table is saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    half = sin.shape[-1]
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin, value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin, value=direction)
    return out
