"""A checkpoint is exported for the time being, measured, and what was measured is recorded with its run."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from launch.evaluate.benchmarks import Benchmarks, BenchmarksFailed, run_benchmarks
from launch.evaluate.offline import Request, Results, evaluate_export
from launch.train.metrics import Event, MetricsWriter
from launch.train.run_folder import RunFolder
from launch.train.run_tokenizer import run_tokenizer
from launch.train.seen_checkpoint import whole_checkpoint
from launch.train.tensorboard import TensorBoard
from model.hf_export import export_checkpoint
from nanotron_recipes.recipe import Recipe


@contextmanager
def exported(checkpoint: Path, recipe: Recipe, run: RunFolder | None) -> Iterator[Path]:
    """A Hugging Face folder of the checkpoint, gone afterwards; with the tokenizer where that is at hand."""
    with tempfile.TemporaryDirectory(prefix="evaluation-") as scratch:
        out = Path(scratch) / "export"
        export_checkpoint(checkpoint, out, tokenizer_dir=run_tokenizer(run, recipe))
        yield out


def evaluate_step(run: RunFolder, step: int, request: Request, benchmarks: Benchmarks | None = None) -> Results:
    """Measure one checkpoint of a run, whose parts may lie on several disks; records nothing.

    Raises UserError, OSError.
    """
    assert request.recipe is not None
    with whole_checkpoint(run, step) as checkpoint, exported(checkpoint, request.recipe, run) as export:
        return measure(export, request, benchmarks, benchmarks_folder(run, step))


def measure(export: Path, request: Request, benchmarks: Benchmarks | None, output: Path) -> Results:
    """Measure an exported folder; what lighteval writes goes to `output`. Where lighteval fails, the results say why,
    and have what was measured without it. Raises as `evaluate_step`."""
    results = evaluate_export(export, request)
    if benchmarks is None:
        return results
    try:
        return replace(results, benchmarks=run_benchmarks(export, benchmarks, output, request.batch_size))
    except BenchmarksFailed as error:
        return replace(results, error=str(error))


def benchmarks_folder(run: RunFolder, step: int) -> Path:
    """Where lighteval leaves its results of a step."""
    return run.path / "evaluations" / str(step)


def record(run: RunFolder, event: Event) -> None:
    """Append an `evaluation` event to the run's metrics.jsonl, which a training may write at the same time: a line is
    one append. Its figures go to a folder of TensorBoard's files of its own: readers of one folder leave a file for
    good when a newer one is there. Raises OSError."""
    writer = MetricsWriter(run.metrics_file)
    writer.on_event(event)
    writer.close()
    board = TensorBoard(run.tensorboard / "evaluation", first_step=1)
    board.on_event(event)
    board.close()
