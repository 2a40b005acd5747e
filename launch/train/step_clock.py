"""How long a rank's own part of a step takes: what tells the slow rank from those that wait for it."""

import time
from typing import Any

import torch

from parallel.p2p import BufferedP2P
from parallel.process_groups import EngineContext


class StepClock:
    """Times a rank's forward and backward passes, up to where it begins to wait for other replicas' gradients.

    On a CPU that is wall time, without the time spent waiting for messages of other pipeline stages. On CUDA it is the
    time between two events on the stream, which are read when the step is over and the host has waited for the device
    in any case: nothing is synchronised for it.

    It cannot tell the ranks of one tensor-parallel group from each other, which wait for each other within every layer,
    nor, on CUDA, the stages of a pipeline, whose messages are waited for on the stream: there it says nothing.
    """

    def __init__(self, context: EngineContext, p2p: Any) -> None:
        self._p2p = p2p if isinstance(p2p, BufferedP2P) else None
        self._cpu: list[float] = []
        self._events: list[Any] | None = None
        if context.device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if context.pp_pg.size() == 1 else []

    def begin(self) -> None:
        """The step's work begins."""
        self._mark(0)

    def end(self) -> None:
        """This rank's passes are done (on CUDA: queued)."""
        self._mark(1)

    def seconds(self) -> float | None:
        """Of the last step, once it is over on the device; None where it cannot be told, or before the first."""
        if self._events is not None:
            return float(self._events[0].elapsed_time(self._events[1])) / 1000 if self._events else None
        return self._cpu[1] - self._cpu[0] if len(self._cpu) == 2 else None

    def _mark(self, number: int) -> None:
        if self._events is None:
            waited = self._p2p.waited_seconds if self._p2p is not None else 0.0
            self._cpu[number:] = [time.perf_counter() - waited]
        elif self._events:
            self._events[number].record()
