"""The report of a pipeline: what every stage's model can do, what each stage gained, and how its training went."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttraining.evaluate.results import Results, read_results
from posttraining.evaluate.scoring import Estimate, Kind, by_problem, gain
from posttraining.files import write_whole
from posttraining.stage_plot import plot_stage

METRICS, MARGINS = "metrics.jsonl", "margins.json"
"""What a stage that trains leaves in its folder, one JSON object for each logged step, with TRL's names; and what a
preference stage measured on held-out pairs."""

_GAINED: tuple[Kind, ...] = ("right", "well_formed", "tokens")


def write_report(output: Path, stages: Mapping[str, tuple[str, Path]], seconds: Mapping[str, float]) -> str:
    """Write report.md, report.json and plots/<stage>.png into `output`; returns the tables as text.

    `stages`: name → (command, folder), in order. `seconds`: what each took. The tables hold scores only, so that two
    runs with one seed have the same; times stand in a section of their own.
    """
    evaluations = [read_results(folder) for command, folder in stages.values() if command == "evaluate"]
    tables = "\n\n".join(all_tables(results) for results in evaluations)
    losses = held_out_table({name: folder for name, (command, folder) in stages.items() if command == "sft"})
    margins = margins_table({name: folder for name, (_, folder) in stages.items()})
    tables = "\n\n".join(table for table in (tables, losses, margins) if table)
    plots = [
        name
        for name, (command, folder) in stages.items()
        if (folder / METRICS).is_file() and plot_stage(command, read_metrics(folder), output / "plots" / f"{name}.png")
    ]
    times = [f"| {name} | {command} | {seconds[name]:.0f} |" for name, (command, _) in stages.items()]
    parts = [
        "# Post-training",
        tables,
        "## Stages",
        "| stage | command | seconds |\n|---|---|---:|\n" + "\n".join(times),
    ]
    parts += [f"### {name}\n\n![{name}](plots/{name}.png)" for name in plots]
    write_whole(output / "report.md", "\n\n".join(parts) + "\n")
    content = {
        "scores": [_scores(results) for results in evaluations],
        "stages": {name: {"command": command, "seconds": seconds[name]} for name, (command, _) in stages.items()},
    }
    write_whole(output / "report.json", json.dumps(content, indent=2) + "\n")
    return tables


def all_tables(results: Results) -> str:
    """Markdown: every table of an evaluation that has lines."""
    tables = [scores_table(results)] if any(results.summaries.values()) else []
    tables += [gains_table(results)] if tables and len(results.summaries) > 1 else []
    tables += [harness_table(results)] if results.harness else []
    return "\n\n".join(tables)


def scores_table(results: Results) -> str:
    """Markdown: a line for each model and task."""
    lines = ["| model | task | n | accuracy | format | tokens | ended |", "|---|---|---:|---:|---:|---:|---:|"]
    for model, tasks in results.summaries.items():
        for task, summary in tasks.items():
            tokens = f"{summary.tokens.mean:.1f} ± {summary.tokens.error:.1f}"
            cells = [model, task, str(summary.n), str(summary.accuracy), str(summary.format), tokens]
            lines.append(f"| {' | '.join([*cells, f'{summary.ended.mean:.3f}'])} |")
    return "\n".join(lines)


def gains_table(results: Results) -> str:
    """Markdown: what each model gained over the one before it on the same problems; errors are those of differences."""
    lines = ["| gain | task | accuracy | format | tokens |", "|---|---|---:|---:|---:|"]
    models = list(results.summaries)
    for before, after in itertools.pairwise(models):
        for task in results.summaries[after]:
            if task not in results.summaries[before]:
                continue
            old, new = results.scores(before, task), results.scores(after, task)
            gains = [gain(by_problem(old, kind), by_problem(new, kind)) for kind in _GAINED]
            cells = [f"{before} → {after}", task, *map(_signed, gains[:2]), _signed(gains[2], digits=1)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def harness_table(results: Results) -> str:
    """Markdown: what the standard harness measured, a line for each task and metric."""
    models = list(results.harness)
    lines = [f"| task | metric | {' | '.join(models)} |", "|---|---|" + "---:|" * len(models)]
    first = results.harness[models[0]]
    for task, metric in [(task, metric) for task, metrics in first.items() for metric in metrics]:
        values = [results.harness[model].get(task, {}).get(metric) for model in models]
        shown = ["–" if value is None else f"{value:.4g}" for value in values]
        # A bar would end the cell: aime25|0.
        lines.append(f"| {task.replace('|', ':')} | {metric} | {' | '.join(shown)} |")
    return "\n".join(lines)


def held_out_table(folders: Mapping[str, Path]) -> str:
    """Markdown: the loss on held-out rows of stages that measured it; before only with `eval_on_start`. Else empty."""
    lines = []
    for name, folder in folders.items():
        found = [(record["step"], record["eval_loss"]) for record in read_metrics(folder) if "eval_loss" in record]
        if found:
            before = f"{found[0][1]:.3f}" if found[0][0] == 0 else "–"
            lines.append(f"| {name} | {before} | {found[-1][1]:.3f} |")
    head = ["| loss on held-out rows, nats per token | before | after |", "|---|---:|---:|"]
    return "\n".join([*head, *lines]) if lines else ""


def margins_table(folders: Mapping[str, Path]) -> str:
    """Markdown: what preference stages did to log p(chosen) - log p(rejected) of held-out pairs; else empty."""
    lines = []
    for name, folder in folders.items():
        if (folder / MARGINS).is_file():
            found = json.loads((folder / MARGINS).read_text(encoding="utf-8"))
            before, after, rise = (Estimate(**found[key]) for key in ("before", "after", "gain"))
            lines.append(f"| {name} | {found['pairs']} | {before} | {after} | {_signed(rise)} |")
    head = ["| margin of held-out pairs, nats | n | before | after | gain |", "|---|---:|---:|---:|---:|"]
    return "\n".join([*head, *lines]) if lines else ""


def _signed(value: Estimate, digits: int = 3) -> str:
    return f"{value.mean:+.{digits}f} ± {value.error:.{digits}f}"


def _scores(results: Results) -> dict[str, Any]:
    return {
        model: {task: asdict(summary) for task, summary in tasks.items()} for model, tasks in results.summaries.items()
    }


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What a stage logged; a line that does not parse is left out."""
    records = []
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
