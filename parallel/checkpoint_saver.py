"""Saving while training goes on: a step waits for a copy to host memory only, a thread does the rest.

The thread's collectives run on a gloo group of their own: those of the training cannot come between them. Writing,
flushing and checksums release Python's lock, so the training loses little more than the bandwidth they take.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch.distributed as torch_dist

from parallel.buckets import Bucket
from parallel.checkpoint_disks import Disks
from parallel.checkpoint_tensors import StagingBuffer, writable_tensors
from parallel.checkpoint_writer import CheckpointInfo, SaveFailed, write_checkpoint
from parallel.optimizer import FlatAdamW
from parallel.process_groups import EngineContext

SAVE_TIMEOUT = timedelta(hours=2)
"""How long the fastest disk of a save waits for the slowest."""


@dataclass(frozen=True)
class SaveOutcome:
    """What became of a save; the same on every rank but for the seconds.

    Attributes:
        waited_seconds: for the save before.
        stall_seconds: for the copy to host memory.
        write_seconds: from then until the checkpoint had its name.
        num_bytes: size of the checkpoint, 0 where it failed.
        error: why it failed; None where it did not.
    """

    step: int
    waited_seconds: float
    stall_seconds: float
    write_seconds: float
    num_bytes: int
    error: str | None


class CheckpointSaver:
    """Saves a rank's model and optimizer; every rank makes one and calls `start` at the same steps.

    Usage::

        saver.start(info)         # returns when the state is copied
        for outcome in saver.finished(): …
        saver.wait()              # before the process ends
    """

    def __init__(
        self, buckets: list[Bucket], optimizer: FlatAdamW, context: EngineContext, disks: Disks | None = None
    ) -> None:
        """Allocate the copy's memory and make the group; a collective of the world.

        Args:
            disks: which ranks share a disk; None: all of them.
        """
        self._optimizer = optimizer
        self._staging = StagingBuffer(writable_tensors(buckets, optimizer, context))
        self._group = torch_dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self._disks = disks
        self._thread: threading.Thread | None = None
        self._outcomes: deque[SaveOutcome] = deque()

    def start(self, info: CheckpointInfo, then: Callable[[], None] | None = None) -> None:
        """Copy the state of this moment and write it in the background, after the save before has ended.

        Args:
            then: called on this rank, in the background, when the checkpoint is complete.
        """
        waited = self.wait()
        began = time.perf_counter()
        self._staging.fill()
        counter = self._optimizer.num_updates()
        info = replace(info, state={**info.state, "optimizer_updates": counter})
        outcome = SaveOutcome(int(info.state["step"]), waited, time.perf_counter() - began, 0.0, 0, None)
        # A daemon: a rank whose peers died must be able to end although this still waits for them.
        self._thread = threading.Thread(target=self._write, args=(info, outcome, then), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> float:
        """Return when no save is going on; the seconds that took."""
        began = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return time.perf_counter() - began

    @property
    def is_saving(self) -> bool:
        """Whether a save is going on in the background."""
        return self._thread is not None and self._thread.is_alive()

    def finished(self) -> list[SaveOutcome]:
        """The outcomes since the last call, in order."""
        found = []
        while self._outcomes:
            found.append(self._outcomes.popleft())
        return found

    def _write(self, info: CheckpointInfo, outcome: SaveOutcome, then: Callable[[], None] | None) -> None:
        began = time.perf_counter()
        num_bytes, error = 0, None
        try:
            num_bytes = write_checkpoint(info, self._staging.tensors, self._staging.num_bytes, self._group, self._disks)
            if then is not None:
                then()
        except SaveFailed as failure:
            error = str(failure)
        except BaseException as failure:  # whatever it is, training goes on and says so
            error = f"{type(failure).__name__}: {failure}"
        seconds = time.perf_counter() - began
        self._outcomes.append(replace(outcome, write_seconds=seconds, num_bytes=num_bytes, error=error))
