import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.train.signals import StopRequest
from launch.train.tracing import StepTracer
from nanotron_recipes.schema.services import Profiler


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_are_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as request:
        assert not request.is_set and request.reason == ""
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the same Ctrl-C, delivered twice
        assert request.is_set and request.reason == number.name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.2, 103.0])
    monkeypatch.setattr("launch.train.signals.time.monotonic", lambda: next(clock))
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_repeated_sigterm_goes_on_waiting_for_the_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.train.signals.time.monotonic", iter(range(0, 1000, 10)).__next__)
    with StopRequest() as request:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.is_set


def test_listening_needs_no_heavy_import() -> None:
    heavy = "('torch', 'numpy', 'pydantic')"
    program = f"import sys, launch.train.signals; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_traces_lie_in_the_run_folder_and_follow_the_recipes_section(tmp_path: Path) -> None:
    import torch

    section = Profiler(profiler_export_path="traces", skip_first=2, wait=1, warmup=1, active=2, repeat=1)
    tracer = StepTracer(tmp_path, section, first_step=11, rank=0)
    for _ in range(9):
        torch.ones(8, 8) @ torch.ones(8, 8)
        tracer.step()
    tracer.close()
    (trace,) = (tmp_path / "traces").iterdir()
    assert trace.name == "until-step-16-rank-0.json.gz"
    assert trace.stat().st_size > 1000


def test_a_run_that_ends_early_leaves_no_trace(tmp_path: Path) -> None:
    tracer = StepTracer(tmp_path, Profiler(profiler_export_path="traces"), first_step=1, rank=0)
    tracer.step()
    tracer.close()
    assert not (tmp_path / "traces").exists()
