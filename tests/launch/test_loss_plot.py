"""The picture of a run's losses: what is drawn, and that it is a whole file or none."""

import math
import subprocess
import sys
from pathlib import Path

import matplotlib.axes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.train.loss_plot import plot_losses, smoothed
from launch.train.metrics import Metrics, MetricsWriter, StepRecord, validation_event
from nanotron_recipes.errors import UserError

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def record(step: int, loss: float | None, stage: str) -> StepRecord:
    return StepRecord(
        step=step,
        tokens=step * 10,
        loss=loss,
        lr=1e-3 * step,
        grad_norm=1.0,
        tokens_per_second=100.0,
        step_seconds=0.1,
        data_wait_seconds=0.0,
        memory_peak_bytes=1,
        mfu=None,
        stage=stage,
    )


def run_of(num_steps: int) -> Metrics:
    steps = [record(step, 5.0 / step, "stable" if step <= num_steps // 2 else "decay") for step in range(1, num_steps)]
    events = [validation_event(0, {"prose": 5.0, "code": 6.0}), validation_event(num_steps, {"prose": 1.0})]
    return Metrics([*steps, record(num_steps, None, "decay")], [{"event": "start", "step": 1}, *events])


def test_a_run_is_drawn_with_every_source_and_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, texts = [], []
    plot, annotate = matplotlib.axes.Axes.plot, matplotlib.axes.Axes.annotate
    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda self, *a, **k: labels.append(k.get("label")) or plot(self, *a, **k)
    )
    monkeypatch.setattr(
        matplotlib.axes.Axes, "annotate", lambda self, *a, **k: texts.append(a[0]) or annotate(self, *a, **k)
    )
    out = tmp_path / "new" / "loss.png"
    plot_losses(run_of(100), out)
    assert out.read_bytes().startswith(PNG)
    assert [path.name for path in out.parent.iterdir()] == ["loss.png"]
    assert texts == ["stable", "decay"]
    expected = {"training, mean of 3 steps", "validation: prose", "validation: code"}
    assert {label for label in labels if label} == expected


def test_the_same_records_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_losses(run_of(20), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("metrics", [run_of(1), Metrics([record(7, 2.0, "s")], [])])
def test_a_single_step_is_a_run_too(metrics: Metrics, tmp_path: Path) -> None:
    plot_losses(metrics, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_run_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no step yet"):
        plot_losses(Metrics([], []), tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_the_command_draws_a_file_and_names_a_missing_one(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.on_step(record(1, 2.0, "stable"))
    writer.close()

    def draw(source: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch.train.loss_plot", source, tmp_path / "loss.png"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert draw(tmp_path / "metrics.jsonl").returncode == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    missing = draw(tmp_path / "no.jsonl")
    assert missing.returncode == 2
    assert missing.stderr == f"error: {tmp_path / 'no.jsonl'}: No such file or directory\n"


@given(
    values=st.lists(st.floats(-100, 100) | st.just(math.nan), min_size=1, max_size=40),
    window=st.integers(1, 15).filter(lambda window: window % 2 == 1),
)
def test_smoothing_is_the_mean_of_the_known_neighbours(values: list[float], window: int) -> None:
    means = smoothed(np.array(values), window)
    half = window // 2
    for i, mean in enumerate(means):
        known = [value for value in values[max(0, i - half) : i + half + 1] if math.isfinite(value)]
        assert math.isnan(mean) if not known else mean == pytest.approx(sum(known) / len(known), abs=1e-9)
