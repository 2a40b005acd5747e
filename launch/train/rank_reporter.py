"""A rank's file in runs/<name>/ranks, kept up to date beside the training."""

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
import torch.distributed as torch_dist

from launch.status.gpu import GpuReader
from launch.status.rank_report import FOLDER, RankReport, StepWindows, write_report
from launch.train.hardware import peak_memory_bytes
from launch.train.outage import Outage
from launch.train.streams import say
from parallel.process_groups import EngineContext

SECONDS = 30.0
"""Between two versions of the file."""
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class RankPlace:
    """Which rank it is, and where; see `launch.status.rank_report.RankReport`."""

    rank: int
    pp_rank: int
    tp_group: int
    node: str
    launch: str

    @classmethod
    def of(cls, context: EngineContext, node: str, launch: str) -> Self:
        """The place of this process in the world."""
        tp_group = int(min(torch_dist.get_process_group_ranks(context.tp_pg)))
        return cls(context.rank, context.pp_rank, tp_group, node, launch)


class RankReporter:
    """Writes what this rank says of itself, from a thread: no step waits for a disk or for NVML.

    What cannot be written (a full disk) is left out and said once.
    """

    def __init__(
        self,
        run: Path,
        place: RankPlace,
        device: torch.device,
        tell: Callable[[str], None] = say,
        seconds: float = SECONDS,
    ) -> None:
        self._run, self._place, self._device = run, place, device
        self._seconds = seconds
        self._windows = StepWindows()
        self._step = 0
        self._outage = Outage(
            str(run / FOLDER), "training goes on, and `status` knows less of its ranks", "written again", tell
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="rank report", daemon=True)
        self._thread.start()

    def on_step(self, step: int, compute_seconds: float | None, data_wait_seconds: float) -> None:
        """Note a step of this rank: its own part of it, and the wait for its loader."""
        self._windows.observe(step, compute_seconds, data_wait_seconds)
        self._step = step

    def close(self) -> None:
        """Write the last version. A disk or a driver that does not answer is not waited for long."""
        self._closed.set()
        self._thread.join(_PATIENCE_SECONDS)

    def _keep(self) -> None:
        gpu = GpuReader(_uuid(self._device))
        while True:
            is_last = self._closed.is_set()
            try:
                write_report(self._run, self._report(gpu))
            except OSError as error:
                self._outage.failed(error)
            else:
                self._outage.succeeded()
            if is_last:
                return
            self._closed.wait(self._seconds)

    def _report(self, gpu: GpuReader) -> RankReport:
        return RankReport(
            **asdict(self._place),
            host=socket.gethostname(),
            time=time.time(),
            step=self._step,
            memory_bytes=peak_memory_bytes(self._device),
            windows=self._windows.newest(),
            gpu=gpu.read(),
        )


def _uuid(device: torch.device) -> str | None:
    """As NVML knows the GPU; None on a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None
