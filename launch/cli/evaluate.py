"""`nanotron-recipes evaluate`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launch.cli.checkpoint_argument import CheckpointArgument, choose_checkpoint, real_path, refuse_renamed
from nanotron_recipes.errors import UserError

if TYPE_CHECKING:
    from launch.evaluate.benchmarks import Benchmarks
    from launch.evaluate.offline import Request, Results
    from launch.train.run_folder import RunFolder
    from nanotron_recipes.recipe import Recipe


def evaluate(
    checkpoint: CheckpointArgument,
    tasks: Annotated[
        str, typer.Option(metavar="NAMES", help="What to measure offline; of loss,arithmetic what fits the recipe.")
    ] = "loss,arithmetic",
    benchmarks: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Also benchmarks of lighteval (make eval-env), which need the network."),
    ] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Samples of each benchmark; default: all.")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to compute.")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time; of sums, 25 times as many.")] = 8,
) -> None:
    """Measure a checkpoint, or an exported folder: loss on what is held out of each source, sums to complete.

    What is measured of a run's checkpoint is appended to its metrics.jsonl, and to its TensorBoard files, also while
    the run is trained.

    Examples:

    `nanotron-recipes evaluate runs/latest`

    `nanotron-recipes evaluate runs/tiny-1/checkpoints/800 --tasks loss`

    `nanotron-recipes evaluate my-model --benchmarks "arc:easy|0,hellaswag|0" --device cuda`
    """
    from launch.evaluate.benchmarks import Benchmarks, require_lighteval
    from launch.evaluate.offline import Request, tasks_named

    if max_samples is not None and benchmarks is None:
        raise UserError("--max-samples: is about benchmarks; expected --benchmarks with it")
    request = Request(None, tasks_named(tasks), batch_size, device)
    asked = None if benchmarks is None else Benchmarks(benchmarks, max_samples)
    if asked is not None:
        require_lighteval()
    subject = _choose(checkpoint)
    results = _measure(subject, replace(request, recipe=subject.recipe), asked)
    _show(subject, results)
    if results.error:
        print(f"error: {results.error}", file=sys.stderr)
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Subject:
    """What is measured: a checkpoint, or where `is_export` a Hugging Face folder, and whose it is, where known."""

    folder: Path
    is_export: bool
    recipe: Recipe | None
    run: RunFolder | None
    step: int | None


def _choose(argument: str) -> _Subject:
    path = Path(argument)
    if (path / "config.json").is_file():
        return _export_of_a_run(real_path(path)) or _Subject(path, True, None, None, None)
    chosen = choose_checkpoint(argument, Path("runs"))
    refuse_renamed(chosen)
    return _Subject(chosen.folder, False, chosen.recipe, chosen.run, chosen.step)


def _export_of_a_run(path: Path) -> _Subject | None:
    """The folder `export` of a run, of the step that it says itself."""
    from launch.train.run_folder import RunFolder
    from model.hf_export import exported_step
    from nanotron_recipes.loading import load_recipe

    recipe_file = path.parent / "recipe.yaml"
    if path.name != "export" or not recipe_file.is_file():
        return None
    recipe = load_recipe(str(recipe_file)).recipe
    run = RunFolder.of(path.parent.parent, path.parent.name, recipe)
    return _Subject(path, True, recipe, run, exported_step(path))


def _measure(subject: _Subject, request: Request, benchmarks: Benchmarks | None) -> Results:
    from launch.evaluate.checkpoint import benchmarks_folder, evaluate_step, exported, measure

    run, step = subject.run, subject.step
    if not subject.is_export and run is not None and step is not None:
        return evaluate_step(run, step, request, benchmarks)
    output = benchmarks_folder(run, step) if run is not None and step is not None else Path("evaluations")
    if subject.is_export:
        return measure(subject.folder, request, benchmarks, output)
    assert subject.recipe is not None
    with exported(subject.folder, subject.recipe, run) as export:
        return measure(export, request, benchmarks, output)


def _show(subject: _Subject, results: Results) -> None:
    from rich.console import Console
    from rich.table import Table

    from launch.evaluate.card_facts import bits_per_byte
    from launch.evaluate.checkpoint import record
    from launch.status.evaluation import figure
    from launch.status.runs import short_path

    shown = short_path(subject.run.path if subject.run else subject.folder)
    after = "" if subject.step is None else f" after step {subject.step}"
    table = Table(title=f"{shown}{after}", title_justify="left")
    for heading in ("task", "of", "result", "bits/byte"):
        table.add_column(heading, justify="left" if heading in ("task", "of") else "right")
    for source, loss in results.source_loss.items():
        bits = None if subject.recipe is None else bits_per_byte(loss, source, subject.recipe)
        table.add_row("loss (nats/token)", source, figure(loss), "n/a" if bits is None else f"{bits:.3f}")
    if results.arithmetic:
        correct, total = results.arithmetic["correct"], results.arithmetic["total"]
        table.add_row("arithmetic", f"{total} held-out problems", f"{correct / total:.1%}", "")
    for task, metrics in results.benchmarks.items():
        for metric, value in metrics.items():
            table.add_row(task, metric, figure(value), "")
    Console(soft_wrap=True).print(table, markup=False)
    for task, reason in results.left_out.items():
        print(f"{task}: left out: {reason}")
    if not results:
        print("next: nothing is recorded, since nothing was measured")
    elif subject.run is not None and subject.step is not None:
        record(subject.run, results.event(subject.step))
        print(f"recorded in {shown / subject.run.metrics_file.name}")
        print(f"next: nanotron-recipes status {shown}")
    else:
        print("next: nothing is recorded, since this is no checkpoint of a run")
