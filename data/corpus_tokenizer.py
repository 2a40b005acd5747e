"""The tokenizer that a corpus is tokenized with: a given one, or one that is trained on it when it is needed."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from data.tokenizer import TokenizerInfo, read_tokenizer, tokenizer_folder, tokens_around, train_tokenizer
from nanotron_recipes.errors import UserError
from nanotron_recipes.files import write_atomic
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.data import Corpus


def present_tokenizer(recipe: Recipe) -> TokenizerInfo | None:
    """The recipe's tokenizer; None where it is one to be trained and is missing or damaged.

    Raises UserError where a given one is.
    """
    folder = tokenizer_folder(recipe)
    try:
        return read_tokenizer(folder)
    except UserError:
        if recipe.tokenizer.tokenizer_name_or_path is not None:
            raise
        return None


def ensure_tokenizer(recipe: Recipe, corpus: Corpus, settings: str, console: Console) -> TokenizerInfo:
    """The recipe's tokenizer, trained where that is due: where it is missing, damaged or of other `settings` (a hash of
    what it follows from).

    Raises UserError where it has more tokens than the model, and where another's files are in the place.
    """
    folder = tokenizer_folder(recipe)
    train = recipe.tokenizer.train
    if recipe.tokenizer.tokenizer_name_or_path is None:
        assert train is not None, "tokenizer_folder has checked it"
        _check_vocab_size(recipe, train.vocab_size, "tokenizer.train.vocab_size is")
        made_with = Path(corpus.path, "tokenizer.settings")
        if not made_with.exists() and folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}: expected a free place for a tokenizer; `tokenize` did not make this one")
        recorded = made_with.read_bytes() if made_with.is_file() else b""
        if recorded.strip() != settings.encode() or present_tokenizer(recipe) is None:
            console.print(f"training a tokenizer of {train.vocab_size:,} entries", soft_wrap=True, highlight=False)
            write_atomic(made_with, "unfinished\n")
            train_tokenizer(corpus, train.vocab_size, folder)
            write_atomic(made_with, settings + "\n")
    tokenizer = read_tokenizer(folder)
    _check_vocab_size(recipe, tokenizer.vocab_size, f"the tokenizer {folder} has")
    return tokenizer


def _check_vocab_size(recipe: Recipe, found: int, where: str) -> None:
    vocab_size = recipe.model.architecture.vocab_size
    if found > vocab_size:
        raise UserError(f"model.model_config.vocab_size: {vocab_size}: {where} {found}, expected at most as many")


def tokenizer_notes(recipe: Recipe, tokenizer: TokenizerInfo) -> Iterator[str]:
    """What is worth knowing of a tokenizer beside the model and the shards."""
    rows = recipe.model.architecture.vocab_size
    if tokenizer.vocab_size < rows:
        yield (
            f"model.model_config.vocab_size: {rows}: the tokenizer {tokenizer.folder} has {tokenizer.vocab_size} "
            "tokens; no text has the others"
        )
    if added := tokens_around(tokenizer.file):
        yield (
            f"{tokenizer.folder}: the tokenizer puts {' '.join(added)} around a text by itself; no shard has that: "
            "encode prompts with add_special_tokens=False"
        )
