"""Attention as its definition reads, in float64: the reference of the attention tests."""

import torch


def naive_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position_ids: torch.Tensor, mask_documents: bool
) -> torch.Tensor:
    """q [B, S, heads, head_dim], k and v [B, S, kv_heads, head_dim], position_ids [B, S] -> as q, in float64."""
    batch, length, heads, head_dim = q.shape
    q, k, v = (tensor.double().cpu() for tensor in (q, k, v))
    group = heads // k.shape[2]
    rows = []
    for b in range(batch):
        documents = (position_ids[b] == 0).cumsum(0).tolist()
        for i in range(length):
            allowed = [j for j in range(i + 1) if not mask_documents or documents[j] == documents[i]]
            for head in range(heads):
                keys, values = k[b, allowed, head // group], v[b, allowed, head // group]
                weights = torch.softmax(keys @ q[b, i, head] / head_dim**0.5, dim=0)
                rows.append(weights @ values)
    return torch.stack(rows).view(batch, length, heads, head_dim)


def positions_of(lengths: list[int]) -> torch.Tensor:
    """Positions [S] of documents of these lengths, one after the other."""
    return torch.cat([torch.arange(length) for length in lengths])
