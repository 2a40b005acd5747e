"""A stage's picture: what it shows, and that it is large enough to be read."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from posttraining.stage_plot import plot_stage, running_mean


def size(file: Path) -> tuple[int, int]:
    """Width and height, which the header of a PNG holds."""
    width, height = struct.unpack(">II", file.read_bytes()[16:24])
    return width, height


def test_a_running_mean_begins_where_it_has_all_its_points() -> None:
    points = [(10, 1.0), (20, 3.0), (30, 5.0), (40, 1.0)]
    assert running_mean(points, 2) == [(20, 2.0), (30, 4.0), (40, 3.0)]
    assert running_mean(points, 5) == []


@pytest.mark.parametrize(
    ("metrics", "rows"), [(("reward", "entropy"), 1), (("reward", "entropy", "completions/mean_length"), 2)]
)
def test_panels_stand_two_in_a_row(metrics: tuple[str, ...], rows: int, tmp_path: Path) -> None:
    records = [{"step": step, **dict.fromkeys(metrics, step / 7)} for step in range(1, 60)]
    assert plot_stage("grpo", records, tmp_path / "plots" / "grpo.png")
    width, height = size(tmp_path / "plots" / "grpo.png")
    assert (width, height // rows) == (1152, 360)


def test_nothing_logged_is_nothing_drawn(tmp_path: Path) -> None:
    assert not plot_stage("grpo", [{"step": 1, "learning_rate": 0.1}], tmp_path / "grpo.png")
    assert not (tmp_path / "grpo.png").exists()
