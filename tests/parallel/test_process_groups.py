"""nanotron's grid of ranks on gloo."""

import pytest
import torch
import torch.distributed as torch_dist

from parallel.process_groups import EngineContext, init_process_group, lost_connection
from parallel.rank_pool import RankPool


def coordinates_on_rank(dp: int, pp: int, tp: int) -> tuple[int, int, int, int, tuple[int, ...], int]:
    device = torch.device("cpu")
    init_process_group(device)
    context = EngineContext(dp, pp, tp, device)
    total = torch.tensor([context.rank])
    torch_dist.all_reduce(total, group=context.group_of((context.rank,)) if tp == 1 else context.tp_pg)
    found = (context.rank, context.pp_rank, context.dp_rank, context.tp_rank, context.get_3d_ranks(context.rank))
    context.destroy()
    return *found, int(total)


def test_the_pipeline_rank_is_slowest_and_the_tensor_rank_fastest(pool: RankPool) -> None:
    for rank, answer in enumerate(pool.run(8, coordinates_on_rank, 2, 2, 2)):
        pp_rank, dp_rank, tp_rank = rank // 4, rank // 2 % 2, rank % 2
        assert answer == (
            rank,
            pp_rank,
            dp_rank,
            tp_rank,
            (pp_rank, dp_rank, tp_rank),
            rank - tp_rank + rank + 1 - tp_rank,
        )


def test_a_second_world_in_the_same_processes_has_its_own_ranks(pool: RankPool) -> None:
    """nanotron caches the rank in a group by the group; groups of a later world may have the same identity."""
    for dp, pp in ((2, 1), (1, 2), (2, 1)):
        answers = pool.run(2, coordinates_on_rank, dp, pp, 1)
        assert [answer[1:4] for answer in answers] == [(r if pp == 2 else 0, r if dp == 2 else 0, 0) for r in (0, 1)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch_dist.DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited, NCCL version 2.27.5\n"
                "ncclRemoteError: A call failed possibly due to a network error.\n"
                "Last error:\nsocketPollConnect: connect to node2<40001> returned Connection refused\n"
            ),
            "socketPollConnect: connect to node2<40001> returned Connection refused",
        ),
        (
            torch_dist.DistBackendError("NCCL communicator was aborted on rank 5.\nmore"),
            "NCCL communicator was aborted",
        ),
        (torch_dist.DistBackendError("ncclRemoteError: failed\nLast error:\n"), "ncclRemoteError: failed"),
        (torch_dist.DistNetworkError("recv failed\nat a line"), "recv failed"),
        (RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer. Try"), "Connection closed"),
    ],
)
def test_what_is_said_of_a_lost_rank_is_one_line(error: RuntimeError, said: str) -> None:
    found = lost_connection(error)
    assert found is not None and found.startswith(said) and "\n" not in found
    assert lost_connection(RuntimeError("CUDA error: out of memory")) is None
