"""nanotron's `profiler` section: a torch.profiler trace of a few steps."""

from pathlib import Path

STEPS_BEFORE = 5
"""Steps that pass before recording: the first ones allocate, compile and fill caches."""
STEPS_RECORDED = 2
"""Steps in the trace."""


class StepTracer:
    """Records the sixth and seventh step after a start as a Chrome trace (for Perfetto), one file a rank."""

    def __init__(self, run_folder: Path, profiler_export_path: Path, first_step: int, rank: int) -> None:
        """Begin before step `first_step`; a relative `profiler_export_path` is inside the run's folder."""
        import torch
        from torch.profiler import ProfilerActivity, profile, schedule

        self._file = run_folder / profiler_export_path / f"steps-from-{first_step + STEPS_BEFORE}-rank-{rank}.json.gz"
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = profile(
            activities=activities,
            schedule=schedule(wait=STEPS_BEFORE - 1, warmup=1, active=STEPS_RECORDED, repeat=1),
            on_trace_ready=self._export,
        )
        self._profile.start()

    @property
    def file(self) -> Path:
        """Where the trace lies when it is done."""
        return self._file

    def step(self) -> None:
        """Say that a training step is over."""
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """Stop; a run that ends before the steps in question leaves no trace."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _export(self, profiler: "object") -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._file))  # type: ignore[attr-defined]
