"""A rank's file in runs/<name>/ranks, kept up to date beside the training."""

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

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


class RankReporter:
    """Writes what this rank says of itself, from a thread: no step waits for a disk or for NVML.

    What cannot be written (a full disk) is left out and said once.
    """

    def __init__(
        self,
        run: Path,
        context: EngineContext,
        node: str,
        launch: str,
        tell: Callable[[str], None] = say,
        seconds: float = SECONDS,
    ) -> None:
        self._run, self._context, self._node, self._launch = run, context, node, launch
        self._seconds = seconds
        self._windows = StepWindows()
        self._step = 0
        self._tp_group = int(min(torch_dist.get_process_group_ranks(context.tp_pg)))
        self._pp_rank = context.pp_rank
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
        gpu = GpuReader(_uuid(self._context.device))
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
            rank=self._context.rank,
            launch=self._launch,
            host=socket.gethostname(),
            node=self._node,
            pp_rank=self._pp_rank,
            tp_group=self._tp_group,
            time=time.time(),
            step=self._step,
            memory_bytes=peak_memory_bytes(self._context.device),
            windows=self._windows.newest(),
            gpu=gpu.read(),
        )


def _uuid(device: torch.device) -> str | None:
    """As NVML knows the GPU; None on a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None
