"""`nanotron-recipes data fertility`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.next_line import command
from launch.cli.options import OverrideOption, RecipeArgument, local_path
from nanotron_recipes.errors import UserError

if TYPE_CHECKING:
    from data.fertility import Fertility
    from data.tokenizer import TokenizerInfo
    from nanotron_recipes.recipe import Recipe
    from nanotron_recipes.schema.data import Corpus


def data_fertility(
    recipe: RecipeArgument,
    tokenizer: Annotated[
        list[Path],
        typer.Option(metavar="FOLDER", parser=local_path, help="A tokenizer in Hugging Face form. May be repeated."),
    ],
    overrides: OverrideOption = None,
    sample_bytes: Annotated[
        int, typer.Option(min=1, metavar="BYTES", help="Text of each source that is looked at.")
    ] = 2_000_000,
) -> None:
    """Compare tokenizers on a recipe's corpus: tokens per word and bytes per token, for every source.

    Fewer tokens per word and more bytes per token mean less to compute for the same text; a larger vocabulary costs
    parameters. Words are what stands between white space, so compare bytes per token where a language writes none.

    Example:

    `nanotron-recipes data fertility tiny --tokenizer corpora/tiny/tokenizer --tokenizer my-tokenizer`
    """
    from data.fertility import distinct_names, fertility, sample
    from data.tokenizer import read_tokenizer
    from nanotron_recipes.loading import load_recipe
    from nanotron_recipes.variables import require_variables

    loaded = load_recipe(recipe, overrides or [])
    require_variables(loaded.recipe)
    corpus = loaded.recipe.corpus
    if corpus is None:
        raise UserError(f"{recipe}: corpus: missing; there is no text to compare tokenizers on")
    folders = list(dict.fromkeys(tokenizer))
    infos = dict(zip(distinct_names(folders), map(read_tokenizer, folders), strict=True))
    found: dict[tuple[str, str], Fertility] = {}
    for source in corpus.sources:
        texts = sample(source, corpus, sample_bytes)
        for name, info in infos.items():
            found[source.name, name] = fertility(texts, info)
    _print_table(corpus, infos, found)
    best = max(infos, key=lambda name: _total(corpus, name, found).bytes_per_token)
    if len(infos) > 1:
        print(f"{best} has the most bytes per token over all sources")
    changes = [part for change in _changes(loaded.recipe, infos[best]) for part in ("--set", change)]
    given = [part for override in overrides or [] for part in ("--set", override)]
    follows = "tokenize" if changes else "pretrain"
    print(f"next: {command('nanotron-recipes', follows, recipe, *given, *changes)}")


def _total(corpus: Corpus, name: str, found: dict[tuple[str, str], Fertility]) -> Fertility:
    first, *others = (found[source.name, name] for source in corpus.sources)
    return sum(others, first)


def _print_table(corpus: Corpus, infos: dict[str, TokenizerInfo], found: dict[tuple[str, str], Fertility]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("source", "tokenizer")
    for heading in ("vocabulary", "tokens per word", "bytes per token", "text, bytes"):
        table.add_column(heading, justify="right")
    for source in corpus.sources:
        for name in infos:
            _add_row(table, Text(source.name), Text(name), infos[name], found[source.name, name])
        table.add_section()
    if len(corpus.sources) > 1:
        for name in infos:
            _add_row(table, Text("all"), Text(name), infos[name], _total(corpus, name, found))
    Console().print(table)


def _add_row(table: object, source: object, name: object, info: TokenizerInfo, of: Fertility) -> None:
    cells = (f"{info.vocab_size:,}", f"{of.tokens_per_word:.2f}", f"{of.bytes_per_token:.2f}", f"{of.text_bytes:,}")
    table.add_row(source, name, *cells)  # type: ignore[attr-defined]


def _changes(recipe: Recipe, tokenizer: TokenizerInfo) -> list[str]:
    """What makes a recipe use a tokenizer; nothing where it does. A recipe may have none so far."""
    from data.tokenizer import tokenizer_folder

    has_one = recipe.tokenizer.tokenizer_name_or_path is not None or recipe.tokenizer.train is not None
    if has_one and tokenizer_folder(recipe).resolve() == tokenizer.folder.resolve():
        return []
    changes = [f"tokenizer.tokenizer_name_or_path={tokenizer.folder}"]
    if recipe.tokenizer.train is not None:
        changes.append("tokenizer.train=null")
    if recipe.model.architecture.vocab_size != tokenizer.vocab_size:
        changes.append(f"model.model_config.vocab_size={tokenizer.vocab_size}")
    return changes
