"""`nanotron-recipes data show`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.options import OverrideOption, RecipeArgument
from nanotron_recipes.errors import UserError, shorten, visible

if TYPE_CHECKING:
    from data.inspection import DocumentPart
    from data.plan import DataPlan
    from nanotron_recipes.recipe import Recipe


def data_show(
    recipe: RecipeArgument,
    step: Annotated[int, typer.Option(min=1, help="The step whose batch is shown.")],
    overrides: OverrideOption = None,
    samples: Annotated[int, typer.Option(min=1, help="Sequences of the global batch that are shown.")] = 4,
    first: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    width: Annotated[int, typer.Option(min=10, help="Characters of each document that are shown.")] = 160,
) -> None:
    """Show what a step trains on: the sources of its batch, and of some sequences the documents, their text, the mask.

    Documents are counted over all files of a source; … marks one that began before. *masked at* are places whose target
    does not count in the loss: it is the first token of the next document. The batch is the same on any number of
    ranks.

    Examples:

    `nanotron-recipes data show tiny --step 800`

    `nanotron-recipes data show tiny --step 1 --samples 12 --width 1000`
    """
    from data.plan import DataPlan
    from nanotron_recipes.loading import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    last = loaded.recipe.tokens.train_steps
    if step > last:
        raise UserError(f"--step {step}: expected at most tokens.train_steps {last}")
    plan = DataPlan.from_recipe(loaded.recipe)
    if first >= plan.global_batch_size:
        raise UserError(f"--first {first}: expected less than the {plan.global_batch_size} sequences of a step")
    _print_batch(plan, step)
    _print_documents(plan, step, range(first, min(first + samples, plan.global_batch_size)), width, loaded.recipe)


def _print_batch(plan: DataPlan, step: int) -> None:
    from rich.console import Console

    from nanotron_recipes.source_names import short_names

    planned = plan.planned(step)
    sizes = Counter(planned.stage.sources[number].name for number in planned.numbers.tolist())
    targets = plan.global_batch_size * planned.stage.sequence_length
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"step {step}, stage {planned.stage.name!r}: {plan.global_batch_size} sequences of "
        f"{planned.stage.sequence_length:,} tokens, {planned.num_valid_targets:,} of {targets:,} targets count"
    )
    names = short_names(plan.sources)
    console.print("sequences by source: " + ", ".join(f"{names[name]} {count}" for name, count in sizes.most_common()))


def _print_documents(plan: DataPlan, step: int, samples: range, width: int, recipe: Recipe) -> None:
    from itertools import groupby

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from data.inspection import document_parts

    decode = _decoder(recipe)
    for sample, parts in groupby(document_parts(plan, step, samples), key=lambda part: part.sample):
        table = Table(title_justify="left", show_edge=False)
        for heading in ("tokens", "document", "masked at"):
            table.add_column(heading, no_wrap=True)
        table.add_column("text", overflow="fold")
        for part in parts:
            table.title = Text(f"sequence {sample}: {part.source}")
            document = f"{part.document:,}" if part.begins else f"… {part.document:,}"
            where = f"{part.first}–{part.first + len(part.tokens) - 1}"
            masked = ", ".join(map(str, part.masked.tolist()))
            table.add_row(where, document, masked, Text(_shortened(decode, part, width)))
        Console().print(table)


def _shortened(decode: Callable[[list[int]], str], part: DocumentPart, width: int) -> str:
    text = decode(part.tokens[: 2 * width].tolist())
    return shorten(visible(text.replace("\n", "⏎").replace("\t", "⇥")), width)


def _decoder(recipe: Recipe) -> Callable[[list[int]], str]:
    """From token ids to text, with special tokens; to the ids themselves where the tokenizer is not here."""
    from data.tokenizer import tokenizer_of

    try:
        file = tokenizer_of(recipe).file
    except UserError as error:
        print(f"note: token ids instead of text: {error}")
        return lambda ids: " ".join(map(str, ids))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))
