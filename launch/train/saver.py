"""When a run saves, what is told about it, and what is deleted afterwards."""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any

from launch.storage.state import Checkpoint
from launch.storage.uploads import Uploads
from launch.train.engine import TrainingEngine
from launch.train.metrics import Event
from launch.train.retention import damaged_steps, delete_checkpoint, prunable_steps
from launch.train.run_folder import RunFolder
from launch.train.streams import describe, say
from parallel.checkpoint_disks import Disks
from parallel.checkpoint_saver import CheckpointSaver, SaveOutcome
from parallel.checkpoint_writer import CheckpointInfo, SaveFailed, remove_leftovers

Clock = Callable[[], float]


class RunSaver:
    """Saves the run of a launch in the background; every rank makes one (a collective).

    Attributes:
        damaged: steps that a resume refused: they count for nothing.
    """

    def __init__(
        self,
        folder: RunFolder,
        engine: TrainingEngine,
        files: Mapping[str, str],
        damaged: frozenset[int],
        disks: Disks,
        clock: Clock = time.monotonic,
        uploads: Uploads | None = None,
    ) -> None:
        """
        Args:
            uploads: of this rank's disk, where it has any.
        """
        self._uploads = uploads
        self._done_uploads: Collection[Checkpoint] = ()
        self._pruning: threading.Thread | None = None
        self._folder = folder
        self._engine = engine
        self._files = files
        self.damaged = set(damaged)
        self._clock = clock
        self._policy = engine.recipe.checkpoints
        self._is_first = engine.context.rank == 0
        self._prunes = disks.is_leader
        if disks.is_leader:
            remove_leftovers(folder.checkpoints)
        self._saver = CheckpointSaver(engine.built.buckets, engine.optimizer, engine.context, disks)
        self._last_start = clock()
        self._saved: float | None = None
        self._save_seconds: float | None = None
        self._last_outcome: SaveOutcome | None = None
        self._newest: int | None = None

    def is_due_by_clock(self) -> bool:
        """Whether so many minutes have passed without a save; asked of the first rank only, which speaks for all."""
        minutes = self._policy.checkpoint_interval_minutes
        return self._is_first and minutes is not None and self._clock() - self._last_start >= 60 * minutes

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin to save the state after `step`; returns when it is copied to host memory."""
        info = CheckpointInfo(
            folder=self._folder.checkpoints / str(step),
            state={"step": step, **state},
            files=self._files,
            world=_world(self._engine),
            copies=self._policy.copies,
        )
        self._saver.start(info, (lambda: self._prune_after_save(step)) if self._prunes else None)
        self._save_seconds = None if self._saved is None else self._clock() - self._saved
        self._last_start = self._saved = self._clock()

    def go_back(self, to: int, files: Mapping[str, str], refused: Collection[int]) -> None:
        """Go on saving a run that went back to step `to`: no newer checkpoint is left.

        Args:
            files: as in the constructor, from now on.
            refused: steps that were found to be damaged.
        """
        self._files = files
        self._newest = to
        self.damaged = {step for step in self.damaged.union(refused) if step <= to}

    def reports(self) -> list[Event]:
        """A record of every save that has ended since the last call, and of what has become of uploads."""
        outcomes = self._saver.finished()
        for outcome in outcomes:
            self._last_outcome = outcome
            self._newest = outcome.step if outcome.error is None else self._newest
        saved = [{"event": "checkpoint", **asdict(outcome)} for outcome in outcomes]
        return [*saved, *self._look_at_uploads()]

    def finish(self) -> list[Event]:
        """Wait for the save that is going on; what `reports` returns. Nothing is deleted then before the next save."""
        self._saver.wait()
        events = self.reports()
        self._wait_for_pruning()
        return events

    def require_saved(self, step: int) -> None:
        """Raise SaveFailed, on all ranks, where the newest save was of this step and failed. Call `finish` before."""
        outcome = self._last_outcome
        if outcome is not None and outcome.step == step and outcome.error is not None:
            raise SaveFailed(f"the state after step {step} could not be saved: {outcome.error}")

    def _prune_after_save(self, step: int) -> None:
        self._wait_for_pruning()
        self.prune(step)

    def _look_at_uploads(self) -> list[Event]:
        """Delete in the background what an upload has held, where no save is going on, which deletes afterwards."""
        if self._uploads is None:
            return []
        state, step = self._uploads.look(), self._newest
        done = () if state is None else tuple(state.done)
        if done != self._done_uploads and not self._saver.is_saving and step is not None:
            self._done_uploads = done
            self._wait_for_pruning()  # it has ended, or nearly so
            self._pruning = threading.Thread(target=self.prune, args=(step,), name="prune", daemon=True)
            self._pruning.start()
        return self._uploads.events(self._save_seconds)

    def _wait_for_pruning(self) -> None:
        if self._pruning is not None:
            self._pruning.join()
            self._pruning = None

    def prune_at_end(self) -> None:
        """Delete what uploads that ended after the last save have held. Needs no other rank."""
        self._wait_for_pruning()
        if self._prunes and self._newest is not None:
            self.prune(self._newest)

    def prune(self, step: int) -> None:
        """Delete from this rank's disk what the policy does not keep, of the steps up to the one just saved."""
        self.damaged.discard(step)
        try:
            steps = [other for other in self._folder.steps() if other <= step]
            damaged = self.damaged | damaged_steps(self._folder, steps, checksums=False)
            good = [other for other in steps if other not in damaged]
            uploading = None if self._uploads is None else self._uploads.uploading(good)
            for old in prunable_steps(steps, damaged, self._policy, uploading):
                for left in delete_checkpoint(self._folder, old):
                    say(f"{left}: left where it is; no save wrote it")
        except OSError as error:  # the save itself is good
            say(f"an old checkpoint could not be deleted: {describe(error)}", error=True)


def _world(engine: TrainingEngine) -> dict[str, int]:
    topology = engine.topology
    zero = engine.recipe.optimizer.zero_stage
    return {"dp": topology.dp, "pp": topology.pp, "tp": topology.tp, "zero_stage": zero}
