"""Process groups: nanotron's grid of ranks (pipeline x data x tensor) on gloo as well as on nccl."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist

from parallel.nanotron_import import import_nanotron

import_nanotron()

from nanotron import distributed as nanotron_dist  # noqa: E402
from nanotron.parallel import ParallelContext  # noqa: E402

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for a missing rank; nanotron's own default."""

_GLOO_ERROR = re.compile(r"\[\S*gloo/transport/\S*\] (.+?)(?:\. |$)", re.MULTILINE)
"""Of gloo's transport: the line of its code, what happened, and advice for its developers."""

_NCCL_CAUSE = "Last error:\n"


def pick_device(local_rank: int) -> torch.device:
    """The device of a rank: its GPU where CUDA is there, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def why_no_cuda() -> str:
    """What torch says where CUDA is not there, in a line: it was built without, or the driver is too old for it."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return "no GPU is found"


def init_process_group(device: torch.device, timeout: timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Join the world that torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) describes.

    nccl on CUDA, gloo on the CPU: nanotron's own `initialize_torch_distributed` refuses a machine without CUDA.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch_dist.init_process_group(backend=backend, timeout=timeout)


def lost_connection(error: BaseException) -> str | None:
    """What an exception says of a connection to another rank that broke; None where it is about something else."""
    if isinstance(error, torch_dist.DistNetworkError):
        return str(error).partition("\n")[0]
    if isinstance(error, torch_dist.DistBackendError):  # of nccl, which tells the cause last, if at all
        told, _, cause = str(error).strip().partition(_NCCL_CAUSE)
        return (cause.strip() or told).partition("\n")[0]
    match = _GLOO_ERROR.match(str(error)) if isinstance(error, RuntimeError) else None
    return match[1] if match else None


class EngineContext(ParallelContext):
    """nanotron's `ParallelContext` that leaves the device to `pick_device`, so that it runs on gloo as well.

    The process group must be initialised before (`init_process_group`). Ranks are ordered as in nanotron:
    pipeline rank slowest, then data, then tensor rank.

    Attributes:
        device: where this rank's parameters and activations live.
    """

    def __init__(self, dp: int, pp: int, tp: int, device: torch.device) -> None:
        self.device = device
        super().__init__(tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp)

    def set_device(self) -> None:
        """Called by nanotron's constructor; `torch.cuda.set_device` raises on a build without CUDA."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @property
    def dp_rank(self) -> int:
        return int(nanotron_dist.get_rank(self.dp_pg))

    @property
    def pp_rank(self) -> int:
        return int(nanotron_dist.get_rank(self.pp_pg))

    @property
    def tp_rank(self) -> int:
        return int(nanotron_dist.get_rank(self.tp_pg))

    @property
    def rank(self) -> int:
        return int(os.environ["RANK"])

    def group_of(self, global_ranks: tuple[int, ...]) -> Any:
        """The process group of exactly these world ranks, which must exist already."""
        return self.world_ranks_to_pg[tuple(sorted(global_ranks))]

    def destroy(self) -> None:
        """Leave the world. nanotron caches ranks by group for ever; a later world in this process must not see them."""
        super().destroy()
        nanotron_dist.get_rank.cache_clear()
        nanotron_dist.get_global_rank.cache_clear()


@contextmanager
def single_process_context(device: torch.device) -> Iterator[EngineContext]:
    """A world of this process alone, for work outside a run (export, verification); left as it was found."""
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    store = torch_dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)  # type: ignore[attr-defined]
    torch_dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    context = EngineContext(dp=1, pp=1, tp=1, device=device)
    try:
        yield context
    finally:
        context.destroy()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
