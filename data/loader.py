"""Reads batches ahead in threads, so that a training step finds its batch ready."""

import mmap
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

import numpy as np

from data.batch import Allocate, StepBatch, StepBuffers
from data.plan import DataPlan

DEPTH = 4
"""Batches that are read ahead."""
STEPS_ANNOUNCED = 4
"""Steps beyond the one that is read whose tokens the system is asked for."""


class RankBatches:
    """What one data-parallel rank trains on, step by step, in a ring of buffers that are filled again and again."""

    def __init__(
        self,
        plan: DataPlan,
        *,
        dp: int,
        dp_rank: int,
        num_micro_batches: int,
        micro_batch_size: int,
        allocate: Allocate = np.empty,
        announce: bool = False,
    ) -> None:
        """Micro-batches as `DataPlan.step` makes them; `allocate` gives the memory, such as pinned memory for CUDA.

        With `announce` the system is asked to read the tokens of the next steps while those of this one are copied:
        a thread that waits for a disk in the middle of a mapped file stops all others.
        """
        self._plan = plan
        self._dp, self._dp_rank = dp, dp_rank
        self._num_micro_batches, self._micro_batch_size = num_micro_batches, micro_batch_size
        self._allocate = allocate
        self._ring: dict[int, StepBuffers] = {}
        self._announce = announce and hasattr(mmap, "MADV_WILLNEED")
        self._announced = 0

    def __call__(self, step: int, slot: int) -> StepBatch:
        """The batch of a step, in the buffers of place `slot` of the ring; what was in them before is lost."""
        if self._announce:
            ahead = range(max(step, self._announced + 1), min(step + STEPS_ANNOUNCED, self._plan.train_steps) + 1)
            for later in ahead:
                self._plan.announce(later, dp=self._dp, dp_rank=self._dp_rank)
            self._announced = max(self._announced, step + STEPS_ANNOUNCED)
        shape = self._num_micro_batches * self._micro_batch_size, self._plan.sequence_length_at(step)
        buffers = self._ring.get(slot)
        if buffers is None or buffers.shape != shape:
            buffers = self._ring[slot] = StepBuffers.allocated(*shape, self._allocate)
        return self._plan.step(
            step,
            dp=self._dp,
            dp_rank=self._dp_rank,
            num_micro_batches=self._num_micro_batches,
            micro_batch_size=self._micro_batch_size,
            buffers=buffers,
        )


class Prefetcher:
    """An iterator over the batches of steps `first_step` … `last_step`, whatever the number of threads.

    `make(step, slot)` gives the batch of a step; what it raises is raised where that step's batch is asked for. At most
    `depth` batches are made ahead of the one that was given out last, which holds until the next one is asked for:
    steps share `depth` + 1 slots. With 0 `workers` a batch is made when it is asked for. Close it, or use it as a
    context manager, to stop the threads early.
    """

    def __init__(
        self,
        make: Callable[[int, int], StepBatch],
        first_step: int,
        last_step: int,
        workers: int = 1,
        depth: int = DEPTH,
    ) -> None:
        self._make = make
        self._last = last_step
        self._depth = max(depth, workers) if workers else 0
        self._asked = first_step - 1
        """The step whose batch was asked for last."""
        self._begun = first_step - 1
        self._made: dict[int, StepBatch | BaseException] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._threads = [threading.Thread(target=self._work, name="data-prefetch", daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._stopped or self._asked >= self._last:
            raise StopIteration
        self._asked += 1
        made = self._wait_for(self._asked) if self._threads else self._attempt(self._asked)
        if isinstance(made, BaseException):
            self.close()
            raise made
        return made

    def close(self) -> None:
        """Stops the threads and waits for them; batches that are ready are dropped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait_for(self, step: int) -> StepBatch | BaseException:
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: step in self._made)
            return self._made.pop(step)

    def _attempt(self, step: int) -> StepBatch | BaseException:
        try:
            return self._make(step, step % (self._depth + 1))
        except BaseException as error:
            return error

    def _work(self) -> None:
        while (step := self._next_to_make()) is not None:
            made = self._attempt(step)
            with self._changed:
                self._made[step] = made
                self._changed.notify_all()

    def _next_to_make(self) -> int | None:
        """The step to make next, None when there is none; whoever holds a batch has not asked for the next one yet, so
        that none of the steps that may be made shares its slot."""
        with self._changed:
            self._changed.wait_for(self._may_go_on)
            if self._stopped or self._begun == self._last:
                return None
            self._begun += 1
            return self._begun

    def _may_go_on(self) -> bool:
        return self._stopped or self._begun == self._last or self._begun < self._asked + self._depth
