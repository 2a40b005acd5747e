"""Milliseconds of the model's pointwise parts, forward and backward, beside the same of autograd pieces.

    python benchmarks/pointwise.py        [--rounds 15]

One process, one thread, float32, at the sizes of one layer in `train_step.py`'s shapes.
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.report import Section, publish
from benchmarks.rounds import ratios, spread, take_turns

if TYPE_CHECKING:
    import torch

SIZES = {"tiny": (12, 256, 16, 64, 192), "hidden 256": (8, 512, 64, 256, 768)}
"""Sequences, tokens of each, head size, hidden size, intermediate size; 4 attention and 2 key-value heads."""

HEADS, KV_HEADS, EPS = 4, 2, 1e-6
CALLS_PER_BLOCK = 5

Times = dict[str, dict[str, list[float]]]


def measure(size: tuple[int, int, int, int, int], rounds: int) -> Times:
    """Seconds a call by part, contestant ("ours", "plain") and round."""
    import torch
    import torch.nn.functional as F

    from model.attention import AttentionInputs, sdpa_attention
    from model.pointwise import rms_norm, swiglu
    from model.rope import apply_rope, rope_table
    from parallel.process_groups import init_process_group

    init_process_group(torch.device("cpu"))
    sequences, length, head_dim, hidden, intermediate = size
    tokens = sequences * length
    table = rope_table(torch.arange(length).expand(sequences, length), head_dim, 1e4, torch.float32)
    inputs = AttentionInputs(None, None, length)

    def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (hidden,), weight, EPS)

    def plain_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def plain_rope(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = table.cos[..., : head_dim // 2], table.sin
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def attention(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        return sdpa_attention(q, k, v, inputs)

    def sequence_first(qkv: torch.Tensor) -> torch.Tensor:
        return attention(qkv.transpose(0, 1)).transpose(0, 1)

    x, weight = _leaf(tokens, hidden), _leaf(hidden)
    gate_up = _leaf(tokens, 2 * intermediate)
    qk = _leaf(sequences, length, HEADS + KV_HEADS, head_dim)
    qkv = _leaf(sequences, length, HEADS + 2 * KV_HEADS, head_dim)
    qkv_sequence_first = _leaf(length, sequences, HEADS + 2 * KV_HEADS, head_dim)
    parts = {
        "RMSNorm: F.rms_norm": (
            _both_ways(plain_norm, x, weight),
            _both_ways(lambda a, b: rms_norm(a, b, EPS), x, weight),
        ),
        "SwiGLU: chunk, F.silu": (_both_ways(plain_swiglu, gate_up), _both_ways(swiglu, gate_up)),
        "RoPE: chunk, cat": (_both_ways(plain_rope, qk), _both_ways(lambda a: apply_rope(a, table), qk)),
        "attention: tokens [S, B]": (_both_ways(sequence_first, qkv_sequence_first), _both_ways(attention, qkv)),
    }
    times = {
        part: take_turns({"plain": plain, "ours": ours}, rounds, CALLS_PER_BLOCK)
        for part, (plain, ours) in parts.items()
    }
    torch.distributed.destroy_process_group()
    return times


def _leaf(*shape: int) -> "torch.Tensor":
    import torch

    return torch.randn(*shape, requires_grad=True)


def _both_ways(function: "Callable[..., torch.Tensor]", *leaves: "torch.Tensor") -> Callable[[], None]:
    """Forward and backward, with gradients that are written anew each time."""
    import torch

    gradient = torch.randn_like(function(*leaves))

    def run() -> None:
        torch.autograd.grad(function(*leaves), leaves, gradient)

    return run


def main() -> None:
    """Measure, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="blocks of each contestant that count")
    parser.add_argument("--dry", action="store_true", help="print, but write no result file")
    arguments = parser.parse_args()

    from parallel.rank_pool import RankPool

    rows: list[tuple[str, ...]] = []
    with RankPool(1) as pool:
        for shape, size in SIZES.items():
            times: Times = pool.run(1, measure, size, arguments.rounds)[0]
            for part, seconds in times.items():
                figures = [f"{1000 * median(seconds[name]):.2f}" for name in ("plain", "ours")]
                rows.append((shape, part, *figures, spread(ratios(seconds["plain"], seconds["ours"]))))
    section = Section(
        title="Forward and backward of one layer's part, one thread",
        columns=("shape", "part: what it is compared with", "plain, ms", "ours, ms", "plain / ours"),
        rows=rows,
        notes="Ratio: median (smallest to largest) of the rounds.",
    )
    publish("pointwise", "The model's pointwise parts beside autograd's own pieces", [section], write=not arguments.dry)


if __name__ == "__main__":
    main()
