"""Messages between pipeline stages."""

import pytest
import torch

from parallel.p2p import BufferedP2P, build_p2p, flush_sends
from parallel.process_groups import EngineContext, init_process_group
from parallel.rank_pool import RankPool


def exchange_on_rank(kind: str) -> tuple[list[int], str, bool, float]:
    """Both ranks send first and receive then, as neighbours do in 1F1B."""
    init_process_group(torch.device("cpu"))
    context = EngineContext(1, 2, 1, torch.device("cpu"))
    p2p = build_p2p(context)
    me, other = context.pp_rank, 1 - context.pp_rank
    tensor = torch.arange(2_000_000, dtype=torch.float32).view(1000, 2000) + me
    if kind == "transposed":
        tensor = tensor.t()
    elif kind == "bfloat16":
        tensor = tensor[:2].bfloat16()
    elif kind == "with a gradient":
        tensor.requires_grad_()
    p2p.send_tensors([tensor], to_rank=other)
    with torch.no_grad():
        tensor.fill_(-1.0)
    [received] = p2p.recv_tensors(num_tensors=1, from_rank=other)
    flush_sends(p2p)
    assert isinstance(p2p, BufferedP2P) and not p2p._in_flight
    context.destroy()
    return list(received.shape), str(received.dtype), received.requires_grad, float(received[1, 0])


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "requires_grad", "values"),
    [
        ("plain", [1000, 2000], "torch.float32", False, [2001.0, 2000.0]),
        ("transposed", [2000, 1000], "torch.float32", False, [2.0, 1.0]),
        ("bfloat16", [2, 2000], "torch.bfloat16", False, [2000.0, 2000.0]),
        ("with a gradient", [1000, 2000], "torch.float32", True, [2001.0, 2000.0]),
    ],
)
def test_two_neighbours_that_both_send_first_do_not_deadlock(
    kind: str, shape: list[int], dtype: str, requires_grad: bool, values: list[float], pool: RankPool
) -> None:
    """And what arrives is what was sent, although the sender's tensor has changed since."""
    results = pool.run(2, exchange_on_rank, kind)
    assert [result[:3] for result in results] == [(shape, dtype, requires_grad)] * 2
    assert [result[3] for result in results] == values
