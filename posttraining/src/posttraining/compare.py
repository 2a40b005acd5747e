"""Losses on the same pairs, each with the same seeds: one csv (run_name, seed, step, metric, value) and one plot.

    posttraining compare tiny --set model=runs/sft --set data.path=runs/pairs/pairs.jsonl --set seeds=[1,2,3]

`compare.csv` has every value; `compare.png` shows the metrics of `plotted`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from posttraining import lineage, prefer
from posttraining.datasets import load_data
from posttraining.errors import NO_VALUE, mistake
from posttraining.files import check_apart, publish
from posttraining.guard import require_sft
from posttraining.model_folder import check_model_folder
from posttraining.next_line import free_folder, stage_command
from posttraining.prefer import MARGINS, PreferSettings
from posttraining.settings import build, read_mapping

STAGE = "compare"
CSV, PLOT = "compare.csv", "compare.png"
COLUMNS = ("run_name", "seed", "step", "metric", "value")

_OWN = ("runs", "seeds", "plotted", "keep_models")

Row = tuple[str, int, int, str, float]


@dataclass(kw_only=True)
class CompareSettings(PreferSettings):
    """Keys of compare.yaml beside those of prefer.yaml, which all runs have in common."""

    runs: dict[str, dict[str, Any] | None]
    """Name of a run → the keys of prefer.yaml in which it differs: {apo_zero: {loss_type: [apo_zero]}, …}.
    null leaves a run out."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Each run is made with each of them."""
    plotted: list[str] = field(default_factory=lambda: ["eval_rewards/margins", "eval_rewards/accuracies", "eval_loss"])
    """Metrics that the plot shows, with TRL's names."""
    keep_models: bool = False
    """Whether the folder of each run, <run>-<seed>, keeps its weights."""


def run(config: str, overrides: Sequence[str] = (), force: str | None = None) -> str | None:
    """Make every run with every seed, those that are there already excepted, and write csv and plot.

    Returns what to call next, in the main process. Raises Mistake.
    """
    from trl import DPOConfig

    from posttraining import training

    mapping, _ = read_mapping(config, STAGE, overrides)
    common = {key: value for key, value in mapping.items() if key not in _OWN}
    settings, arguments = build(mapping, config, (CompareSettings, DPOConfig))
    runs = _runs(settings, config)
    for name, keys in runs.items():
        build({**common, **keys}, f"{config}: runs.{name}", (PreferSettings, DPOConfig))
    folder = check_model_folder(settings.model)
    require_sft(folder, STAGE, force)
    load_data(settings.data, "pairs", config)
    output = Path(settings.output_dir)
    check_apart(output, folder)
    content = {"config": mapping, "parent": lineage.weights_sha256(folder)}
    with training.shared_work_folder(arguments, output, content) as work:
        result = work / "result"
        for name, keys in runs.items():
            for seed in settings.seeds:
                target = result / f"{name}-{seed}"
                if not target.is_dir():
                    prefer.train({**common, **keys, "seed": seed, "output_dir": str(target)}, config, force)
        with arguments.main_process_first(local=False, desc="csv and plot"):
            if arguments.process_index != 0:
                return None
            rows = [row for name in runs for seed in settings.seeds for row in _rows(result, name, seed)]
            _finish(settings, rows, work, output)
    print(summary(rows))
    print(f"compare: {output / PLOT} shows them; {output / CSV} has every value")
    best = _most_gained(rows, list(runs))
    keys = {"model": settings.model, "data": mapping["data"], **runs[best], "output_dir": free_folder(output, best)}
    return stage_command(prefer.STAGE, config, keys)


def _finish(settings: CompareSettings, rows: Sequence[Row], work: Path, output: Path) -> None:
    """Write csv and plot beside the runs' folders, publish them, and drop the work folder."""
    result = work / "result"
    (result / CSV).write_text(to_csv(rows), encoding="utf-8")
    _plot(rows, settings.plotted, result / PLOT)
    for path in result.glob("*/*.safetensors"):
        if not settings.keep_models:
            path.unlink()
    publish(result, output)
    shutil.rmtree(work, ignore_errors=True)  # NFS keeps the lock while it is held


def _runs(settings: CompareSettings, file: str) -> dict[str, dict[str, Any]]:
    """The runs that are to be made. Raises Mistake."""
    runs = {name: keys for name, keys in settings.runs.items() if keys is not None}
    if not runs or not settings.seeds:
        raise mistake(file, "runs" if settings.seeds else "seeds", NO_VALUE, "is empty")
    return runs


def to_csv(rows: Sequence[Row]) -> str:
    """The rows under their column names."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return text.getvalue()


def summary(rows: Sequence[Row]) -> str:
    """A line for each run: its last value of every evaluation metric, mean and standard deviation over the seeds."""
    last: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for name, seed, _, metric, value in rows:
        if metric.startswith(("eval_rewards", "held_out")):
            last[name, metric][seed] = value
    return "\n".join(
        f"{name:<12} {metric:<28} {_spread(list(values.values()))}" for (name, metric), values in last.items()
    )


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _rows(result: Path, name: str, seed: int) -> list[Row]:
    from posttraining.training import METRICS

    folder, rows, step = result / f"{name}-{seed}", [], 0
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        record: Mapping[str, Any] = json.loads(line)
        step = int(record["step"])
        rows += [
            (name, seed, step, metric, float(value))
            for metric, value in record.items()
            if metric not in ("step", "epoch") and isinstance(value, int | float)
        ]
    if (folder / MARGINS).is_file():
        gained = json.loads((folder / MARGINS).read_text(encoding="utf-8"))
        rows.append((name, seed, step, "held_out_margin_gain", gained["gain"]["mean"]))
    return rows


def _most_gained(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The run whose held-out pairs' margins gained most, in the mean of its seeds; the first where none has any."""
    gains: dict[str, list[float]] = defaultdict(list)
    for name, _, _, metric, value in rows:
        if metric == "held_out_margin_gain":
            gains[name].append(value)
    return max(names, key=lambda name: mean(gains[name]) if gains[name] else -math.inf)


def _plot(rows: Sequence[Row], metrics: Sequence[str], target: Path) -> None:
    """One panel a metric: the mean over the seeds, shaded between the lowest and the highest."""
    from matplotlib.figure import Figure

    found = [metric for metric in metrics if any(row[3] == metric for row in rows)]
    figure = Figure(figsize=(4.2 * max(1, len(found)), 3.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, max(1, len(found)), squeeze=False)[0], found, strict=False):
        for name in dict.fromkeys(row[0] for row in rows):
            points: dict[int, list[float]] = defaultdict(list)
            for _, _, step, _, value in (row for row in rows if row[0] == name and row[3] == metric):
                points[step].append(value)
            steps = sorted(points)
            (line,) = axes.plot(steps, [mean(points[step]) for step in steps], label=name, marker=".")
            low, high = [min(points[step]) for step in steps], [max(points[step]) for step in steps]
            axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
        axes.set_title(metric, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7)
    figure.savefig(target, dpi=110, metadata={"Software": None})
