"""After the last step: export, verify, generate, measure, and write it all into the model card."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data.arithmetic import held_out_problems
from data.bigram import bigram_baseline, steps_to_count
from data.manifest import read_manifest
from data.plan import DataPlan
from launch.evaluate.arithmetic_task import ArithmeticResult, arithmetic_accuracy
from launch.evaluate.best_effort import best_effort
from launch.evaluate.card_facts import bits_per_byte, facts_of_run
from launch.evaluate.generation import Generator, Sample, generate_samples
from launch.evaluate.prompts import one_prompt, sample_prompts
from launch.evaluate.verification import LOGIT_TOLERANCE, verify_checkpoint
from launch.train.metrics import MetricsWriter, read_metrics
from launch.train.run_choice import point_latest
from launch.train.run_folder import LATEST_EXPORT, RunFolder
from launch.train.run_tokenizer import run_tokenizer
from launch.train.seen_checkpoint import whole_checkpoint
from launch.train.step_line import ValidationRow, validation_table
from model.hf_export import export_checkpoint
from model.model_card import render_card
from nanotron_recipes.files import write_atomic
from nanotron_recipes.recipe import Recipe

NUM_PROBLEMS = 400
"""Held-out sums and differences that a run with an arithmetic source is asked at its end."""


class ExportIsWrong(RuntimeError):
    """An exported model does not compute what the trained one does."""


def finish_run(folder: RunFolder, recipe: Recipe, plan: DataPlan, console: Console) -> None:
    """Export the last checkpoint, check it and show what the model can do; nothing here touches the training.

    Only the export must go well: whatever else fails is said.

    Raises:
        ExportIsWrong: the exported model does not compute what the trained one does.
    """
    step = recipe.tokens.train_steps
    with _saying(console, "exporting and verifying"), whole_checkpoint(folder, step) as checkpoint:
        export_checkpoint(checkpoint, folder.export, tokenizer_dir=run_tokenizer(folder, recipe), card=None)
        difference = verify_checkpoint(checkpoint, recipe, folder.export)
    if not difference <= LOGIT_TOLERANCE:
        raise ExportIsWrong(f"{folder.export}: logits differ by {difference:.1e} from the trained model's")
    samples: list[Sample] = []
    arithmetic: ArithmeticResult | None = None
    bigram: dict[str, float] = {}
    with _saying(console, "asking the exported model"):
        with best_effort("asking the exported model"):
            generator = Generator(folder.export)
            samples = generate_samples(generator, sample_prompts(recipe, plan))
            arithmetic = _arithmetic(generator, recipe)
        with best_effort("the bigram model to compare with"):
            bigram = _bigram(plan, recipe, console)
    with best_effort("the record of the evaluation"):
        _write_evaluation(folder, recipe, bigram, arithmetic)
    with best_effort("the model card of this run (a shorter one is there)"):
        facts = facts_of_run(folder, recipe, step)
        card = render_card(replace(facts, has_tokenizer=True, prompt=one_prompt(recipe, plan)))
        write_atomic(folder.export / "README.md", card)
    point_latest(folder.path.parent, folder, LATEST_EXPORT)
    with best_effort("the table of results"):
        _show(console, folder, recipe, bigram, arithmetic, samples, difference)


@contextmanager
def _saying(console: Console, what: str) -> Iterator[None]:
    """Say what takes a few seconds: in passing on a terminal, as a line in a log."""
    if not console.is_terminal:
        console.print(f"{what} …")
    with console.status(what):
        yield


def _arithmetic(generator: Generator, recipe: Recipe) -> ArithmeticResult | None:
    if not has_arithmetic(recipe):
        return None
    return arithmetic_accuracy(generator, held_out_problems(NUM_PROBLEMS, seed=0))


def has_arithmetic(recipe: Recipe) -> bool:
    """Whether the recipe trains on the generated sums, so that its model can be asked held-out ones."""
    return recipe.corpus is not None and any(source.reader == "arithmetic" for source in recipe.corpus.sources)


def _bigram(plan: DataPlan, recipe: Recipe, console: Console) -> dict[str, float]:
    """Bits per byte, by source, of a bigram model of tokens that the run trained on."""
    tokens, steps = recipe.tokens, steps_to_count(recipe)
    if not tokens.validates:
        return {}
    if len(steps) < tokens.train_steps:
        console.print(
            f"the bigram model is counted on {len(steps):,} of {tokens.train_steps:,} steps, evenly spread",
            highlight=False,
        )
    losses = bigram_baseline(plan, steps, tokens.limit_val_batches * plan.global_batch_size)
    bits = {source: bits_per_byte(loss, source, recipe) for source, loss in losses.items()}
    return {source: value for source, value in bits.items() if value is not None}


def _write_evaluation(
    folder: RunFolder, recipe: Recipe, bigram: dict[str, float], arithmetic: ArithmeticResult | None
) -> None:
    event: dict[str, object] = {"event": "evaluation", "step": recipe.tokens.train_steps}
    event |= {"bigram_bits_per_byte": bigram}
    if bigram:
        event["bigram_steps"] = len(steps_to_count(recipe))
    if arithmetic is not None:
        event["arithmetic"] = {"correct": arithmetic.correct, "total": arithmetic.total}
    writer = MetricsWriter(folder.metrics_file)
    writer.on_event(event)
    writer.close()


def _show(
    console: Console,
    folder: RunFolder,
    recipe: Recipe,
    bigram: dict[str, float],
    arithmetic: ArithmeticResult | None,
    samples: list[Sample],
    difference: float,
) -> None:
    validations = [event for event in read_metrics(folder.metrics_file).events if event["event"] == "validation"]
    rows = _rows(validations, bigram, recipe) if validations else []
    if rows:
        console.print(validation_table(rows))
    if arithmetic is not None:
        console.print(
            f"arithmetic: {arithmetic.correct} of {arithmetic.total} held-out two-digit sums and differences right "
            f"({arithmetic.accuracy:.1%}, greedy)",
            highlight=False,
        )
    table = Table("prompt", "what the model writes", title="Samples (greedy)", title_justify="left", show_lines=True)
    for sample in samples:
        table.add_row(repr(sample.prompt), repr(sample.text))
    console.print(table, markup=False)
    console.print(f"verified: logits of the export differ by at most {difference:.1e}", highlight=False)


def _rows(validations: list[dict[str, object]], bigram: dict[str, float], recipe: Recipe) -> list[ValidationRow]:
    before = next((event["validation_loss"] for event in reversed(validations) if event["step"] == 0), {})
    after = validations[-1]["validation_loss"]
    assert isinstance(before, dict) and isinstance(after, dict)
    return [
        ValidationRow(source, before.get(source), loss, _bytes_per_token(recipe, source), bigram.get(source))
        for source, loss in after.items()
        if loss is not None
    ]


def _bytes_per_token(recipe: Recipe, source: str) -> float | None:
    if recipe.corpus is None:
        return None
    return read_manifest(Path(recipe.corpus.path) / source).validation.bytes_per_token
