"""Rotary position embedding in the half-split layout of Hugging Face's Llama (Su et al., arXiv:2104.09864)."""

from typing import NamedTuple

import torch


class RopeTable(NamedTuple):
    """Cosine and sine of every position's angles, each [S, B, 1, head_dim / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor


def rope_table(position_ids: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> RopeTable:
    """Angles are computed in float32 (position * theta^(-2i/head_dim)) and then rounded to `dtype`.

    Args:
        position_ids: int64 [S, B].
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.unsqueeze(-1).float() * theta**-exponents
    angles = angles.unsqueeze(2)
    return RopeTable(angles.cos().to(dtype), angles.sin().to(dtype))


def apply_rope(x: torch.Tensor, table: RopeTable) -> torch.Tensor:
    """Rotate x [S, B, heads, head_dim]: dimension i is paired with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (first * table.cos - second * table.sin, second * table.cos + first * table.sin),
        dim=-1,
    )
