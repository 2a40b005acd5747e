"""The training loop: what happens in which order from the first step of a launch to its last."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch.distributed as torch_dist

from data.batch import StepBatch
from data.loader import Prefetcher, RankBatches
from data.plan import DataPlan
from launch.cluster.attempts import now
from launch.storage.uploads import Uploads
from launch.train.buffers import allocator
from launch.train.engine import StepResult, TrainingEngine
from launch.train.guards import RunFailed, SkippedSteps, SpikeDetector
from launch.train.hardware import peak_memory_bytes
from launch.train.metrics import Callback, Event, StepRecord, validation_event
from launch.train.prepare import is_last_step_saved
from launch.train.rank_reporter import RankReporter
from launch.train.replicas import ReplicaCheck
from launch.train.rewind import rewind
from launch.train.run_folder import RunFolder
from launch.train.saver import RunSaver
from launch.train.signals import StopRequest
from launch.train.tracing import StepTracer
from launch.train.watchdog import Watchdog
from model.arithmetic import FlopsFormula, mfu
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schedule import learning_rate_at
from nanotron_recipes.sequences import sequence_length_at, tokens_through
from parallel.checkpoint_disks import Disks

MFU_FORMULA: FlopsFormula = "causal"
"""Which FLOPs `mfu` counts; see `model.arithmetic.flops_per_token`."""


@dataclass(frozen=True)
class Launch:
    """What one launch of a run trains.

    Attributes:
        first_step: the step after the newest checkpoint, or 1.
        stop_after: a step to save and end at, or None.
        peak_flops: of all ranks together, per second; None where it is not known.
        files: what is put beside the tensors of every checkpoint, name -> text.
        disks: which ranks share a disk.
        refused: steps whose checkpoints this launch did not take -> what is wrong with them.
        spikes: of the checkpoint that training goes on from, what `SpikeDetector.state` gave; empty at a beginning.
        uploads: of this rank's disk; None where nothing is uploaded, and on ranks that are not the first of a disk.
    """

    folder: RunFolder
    recipe: Recipe
    plan: DataPlan
    first_step: int
    stop_after: int | None
    peak_flops: float | None
    files: dict[str, str]
    disks: Disks
    refused: Mapping[int, str] = field(default_factory=dict)
    spikes: Mapping[str, Any] = field(default_factory=dict)
    uploads: Uploads | None = None


class TrainingLoop:
    """Trains, validates, saves, and tells the callbacks (rank 0's) what happened. Every rank of the world makes one."""

    def __init__(
        self,
        launch: Launch,
        engine: TrainingEngine,
        callbacks: list[Callback],
        tracer: StepTracer | None,
        reporter: RankReporter,
    ) -> None:
        self._begin(launch)
        self._reporter = reporter
        self._engine = engine
        self._callbacks = callbacks
        self._tracer = tracer
        self._watchdog = Watchdog(launch.recipe.guards.step_timeout_seconds, engine.context.rank)
        self._replicas = (
            ReplicaCheck(engine.built.buckets, engine.context) if launch.recipe.general.replica_check_interval else None
        )
        self._saver = RunSaver(
            launch.folder, engine, launch.files, frozenset(launch.refused), launch.disks, uploads=launch.uploads
        )

    def _begin(self, launch: Launch) -> None:
        """Take over everything that follows from where training goes on."""
        guards = launch.recipe.guards
        self._launch = launch
        self._recipe = launch.recipe
        self._skipped = SkippedSteps(guards.max_skipped_steps, launch.plan.source_names)
        self._spikes = SpikeDetector(guards.loss_spike_window, guards.loss_spike_threshold)
        self._spikes.restore(launch.spikes)

    def run(self, stop: StopRequest) -> int:
        """Train until the recipe's last step, `stop_after`, or a signal; returns the last step taken.

        Raises:
            RunFailed: going on makes no sense; on all ranks alike.
            SaveFailed: the state after the last step that was taken could not be saved; on all ranks alike.
        """
        try:
            with self._watchdog:
                return self._run(stop)
        except RunFailed:
            self._report(self._saver.finish())  # the newest good state, from before the failure
            raise

    def end_uploads(
        self, uploads: Uploads, seconds: float, stop: StopRequest, tell: Callable[[str], None]
    ) -> list[int]:
        """Wait for what is not uploaded yet, `seconds` at most, record it, and end the uploader; no collective.

        Returns:
            The steps that are not uploaded.
        """
        was_set = stop.is_set  # then only a moment is waited for, and nobody can ask again

        def report() -> None:
            self._report(self._saver.reports())

        uploads.wait(seconds, lambda: stop.is_set and not was_set, tell, report)
        uploads.end()
        report()
        self._saver.prune_at_end()
        return uploads.left()

    def _run(self, stop: StopRequest) -> int:
        if self._launch.first_step == 1:
            if self._recipe.checkpoints.save_initial_state:
                self._save(0)
            self._validate(0)
        step = None
        while step is None:
            with self._prefetcher() as batches:
                step = self._train(batches, stop)
        self._report(self._saver.finish())
        self._saver.require_saved(step)
        return step

    def _train(self, batches: Iterator[StepBatch], stop: StopRequest) -> int | None:
        """Train from the launch's first step on; the last step taken, or None where the run went back."""
        last, step = self._recipe.tokens.train_steps, self._launch.first_step - 1
        while step < last:
            step += 1
            began = time.perf_counter()
            with self._watchdog.watch(f"step {step}"):
                batch = next(batches)
                waited = time.perf_counter() - began
                rate, is_due = learning_rate_at(self._recipe, step), self._saver.is_due_by_clock()
                result = self._engine.train_step(batch, rate, lambda: stop.is_set, is_due)
            seconds = time.perf_counter() - began
            self._reporter.on_step(step, self._engine.clock.seconds(), waited)
            self._record(step, result, batch.stage, seconds, waited)
            is_spike = self._guard(step, result, batch.stage)  # before anything is saved
            if self._tracer is not None:
                self._tracer.step()
            if is_spike and self._goes_back(step):
                return None
            is_asked = step == self._launch.stop_after or result.stop_requested
            if is_asked:  # whoever asks may not wait for long
                self._save(step)
            if step == last or _is_due(step, self._recipe.tokens.val_check_interval):
                self._validate(step)
            if is_asked:
                break
            if self._is_save_due(step) or result.save_requested:
                self._save(step)  # last, so that what goes on from here lacks no validation
            self._report(self._saver.reports())
        return step

    def _guard(self, step: int, result: StepResult, stage: str) -> bool:
        """Record what is wrong with a step; whether its loss is a spike. RunFailed where the run has to end."""
        skipped, spike = self._skipped.observe(step, result.skipped), self._spikes.observe(step, result.loss, stage)
        self._report([event for event in (skipped, spike) if event is not None])
        self._skipped.check()
        if self._replicas is not None and _is_due(step, self._recipe.general.replica_check_interval):
            differences = self._replicas.differences()
            if differences:
                names = "; ".join(map(str, differences))
                raise RunFailed("replicas", step, f"after step {step} the copies of parameters differ: {names}")
        return spike is not None

    def _goes_back(self, spike: int) -> bool:
        """Go back to before a spike, where the recipe asks for it and it can be done."""
        if not self._recipe.guards.rewind_after_spike:
            return False
        self._report(self._saver.finish())
        launch = self._launch
        found, event = rewind(launch.folder, launch.disks, self._recipe, self._engine, spike)
        self._event(event)
        if found is None:
            return False
        files = {**launch.files, "recipe.yaml": found.recipe_text}
        self._saver.go_back(found.to, files, found.refused)
        self._begin(
            replace(
                launch,
                recipe=found.recipe,
                plan=DataPlan(found.recipe, launch.plan.sources),
                first_step=found.to + 1,
                files=files,
                spikes=found.state.get("spikes", {}),
            )
        )
        return True

    def _is_save_due(self, step: int) -> bool:
        if step == self._recipe.tokens.train_steps and is_last_step_saved(self._recipe):
            return True
        return _is_due(step, self._recipe.checkpoints.checkpoint_interval)

    def _prefetcher(self) -> Prefetcher:
        topology, context = self._engine.topology, self._engine.context
        workers = max(stage.data.num_loading_workers for stage in self._recipe.data_stages)
        batches = RankBatches(
            self._launch.plan,
            dp=topology.dp,
            dp_rank=context.dp_rank,
            num_micro_batches=topology.num_micro_batches,
            micro_batch_size=topology.micro_batch_size,
            allocate=allocator(context.device),
            announce=workers > 0,
        )
        return Prefetcher(batches, self._launch.first_step, self._recipe.tokens.train_steps, workers)

    def _record(self, step: int, result: StepResult, stage: str, seconds: float, waited: float) -> None:
        if not self._callbacks:
            return
        length = sequence_length_at(self._recipe, step)
        tokens_per_second = self._engine.topology.global_batch_size * length / seconds
        peak = self._launch.peak_flops
        record = StepRecord(
            step=step,
            tokens=tokens_through(self._recipe, step),
            loss=result.loss if math.isfinite(result.loss) else None,
            lr=learning_rate_at(self._recipe, step),
            grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,
            tokens_per_second=tokens_per_second,
            step_seconds=seconds,
            data_wait_seconds=waited,
            memory_peak_bytes=peak_memory_bytes(self._engine.context.device),
            mfu=None if peak is None else mfu(self._recipe, tokens_per_second, peak, MFU_FORMULA, length),
            stage=stage,
        )
        self._tell(lambda callback: callback.on_step(record))

    def _validate(self, step: int) -> None:
        tokens = self._recipe.tokens
        if not tokens.validates:
            return
        context, topology = self._engine.context, self._engine.topology
        losses = {}
        for source in self._launch.plan.sources:
            held_out = self._launch.plan.validation(
                source,
                tokens.limit_val_batches * topology.global_batch_size,
                dp=topology.dp,
                dp_rank=context.dp_rank,
                micro_batch_size=topology.micro_batch_size,
            )
            if held_out.num_valid_targets > 0:
                with self._watchdog.watch(f"the validation on {source} after step {step}"):
                    losses[source] = self._engine.evaluate(held_out.micro_batches) / held_out.num_valid_targets
        self._event(validation_event(step, losses))

    def _save(self, step: int) -> None:
        self._saver.save(step, {"data": self._launch.plan.fingerprint_through(step), "spikes": self._spikes.state()})

    def _report(self, events: list[Event]) -> None:
        for event in events:
            self._event(event)

    def _event(self, event: Event) -> None:
        self._tell(lambda callback: callback.on_event(event))

    def _tell(self, call: Callable[[Callback], None]) -> None:
        for callback in self._callbacks:
            call(callback)


def start_event(engine: TrainingEngine, launch: Launch, launch_id: str) -> Event:
    """The record of a (re)start: when, where and how the following steps are trained."""
    topology, context = engine.topology, engine.context
    return {
        "event": "start",
        "step": launch.first_step,
        "time": now(),
        "launch": launch_id,
        "topology": {
            "dp": topology.dp,
            "pp": topology.pp,
            "tp": topology.tp,
            "zero_stage": launch.recipe.optimizer.zero_stage,
            "micro_batch_size": topology.micro_batch_size,
            "num_micro_batches": topology.num_micro_batches,
            "global_batch_size": topology.global_batch_size,
            "world_size": torch_dist.get_world_size(),
        },
        "device": context.device.type,
        "attention": engine.built.attention.name,
        "data": launch.plan.fingerprint,
        "refused": [{"step": step, "reason": reason} for step, reason in launch.refused.items()],
        "peak_flops": launch.peak_flops,
        "mfu_formula": MFU_FORMULA,
    }


def end_event(verdict: Literal["done", "stopped", "failed"], reason: str) -> Event:
    """The record of a launch's end, as far as its first rank lives to see it, and why."""
    return {"event": "end", "time": now(), "verdict": verdict, "reason": reason}


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
