"""nanotron's `profiler` section: a torch.profiler trace of a few steps."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.train.outage import reason
from launch.train.streams import say
from nanotron_recipes.schema.services import Profiler


class StepTracer:
    """Records the steps that the section chooses as Chrome traces (for Perfetto or TensorBoard), one file a rank."""

    def __init__(self, run_folder: Path, profiler: Profiler, first_step: int, rank: int) -> None:
        """Begin before step `first_step`; a relative `profiler_export_path` is inside the run's folder."""
        import torch
        from torch.profiler import ProfilerActivity, profile, schedule

        assert profiler.profiler_export_path is not None, "without a path there is nothing to trace"
        self._folder = run_folder / profiler.profiler_export_path
        self._first_step = first_step
        self._rank = rank
        self._steps_begun = 0
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = profile(
            activities=activities,
            schedule=schedule(
                skip_first=profiler.skip_first,
                wait=profiler.wait,
                warmup=profiler.warmup,
                active=profiler.active,
                repeat=profiler.repeat,
            ),
            on_trace_ready=self._export,
            record_shapes=profiler.record_shapes,
            profile_memory=profiler.profile_memory,
            with_stack=profiler.with_stack,
        )
        self._profile.start()

    def step(self) -> None:
        """Say that a training step is over."""
        self._steps_begun += 1
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """Stop; a run that ends before the steps in question leaves no trace."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _export(self, profiler: Any) -> None:
        last = self._first_step + self._steps_begun - 1
        path = self._folder / f"until-step-{last}-rank-{self._rank}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except OSError as error:  # a full disk ends no training
            with suppress(OSError):
                path.unlink(missing_ok=True)
            say(f"{path}: not written: {reason(error)}", error=True)
