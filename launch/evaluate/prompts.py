"""What a trained model is asked to go on with: text of the kinds that it was trained on."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from data.plan import DataPlan
from data.tokenizer import tokenizer_folder
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe

if TYPE_CHECKING:
    from data.sources import Source

PROMPTS_OF_READERS = {
    "python-docs": "The function returns",
    "python-code": "def __init__(self, ",
    "arithmetic": "Compute 47+86?\n",
}
"""A prompt for each kind of text that comes with the code."""

ANY_TEXT = "The"
"""For a model of which nothing is known."""

_MAX_PROMPTS = 5
_PROMPT_TOKENS = 12
_SEARCHED_TOKENS = 512


def sample_prompts(recipe: Recipe, plan: DataPlan) -> dict[str, str]:
    """A prompt for each of the first sources of a run, by the source's name.

    Text that comes with the code has prompts of its own; of any other it is the beginning of what is held out of it.
    """
    readers = {source.name: source.reader for source in recipe.corpus.sources} if recipe.corpus else {}
    found = (
        (name, PROMPTS_OF_READERS.get(readers.get(name, "")) or _beginning(source, tokenizer_folder(recipe)))
        for name, source in plan.sources.items()
    )
    return dict(islice(((name, prompt) for name, prompt in found if prompt), _MAX_PROMPTS)) or {"text": ANY_TEXT}


def one_prompt(recipe: Recipe, plan: DataPlan | None = None) -> str:
    """The prompt that shows most: a sum where the model has learnt to add, else the first of `sample_prompts`.

    `plan`: None opens the recipe's data; where that is not at hand `ANY_TEXT` is returned.
    """
    readers = {source.reader for source in recipe.corpus.sources} if recipe.corpus else set()
    if "arithmetic" in readers:
        return PROMPTS_OF_READERS["arithmetic"]
    try:
        return next(iter(sample_prompts(recipe, plan or DataPlan.from_recipe(recipe)).values()))
    except (UserError, OSError):
        return ANY_TEXT


def _beginning(source: Source, tokenizer_dir: Path) -> str:
    """The first words of the first held-out document that has any; empty where nothing is held out."""
    import numpy as np
    from tokenizers import Tokenizer

    length = min(_SEARCHED_TOKENS, source.validation.num_tokens)
    if length == 0:
        return ""
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokens, document_starts = source.validation.windows(np.zeros(1, dtype=np.int64), length)
    for document in np.split(tokens[0], np.flatnonzero(document_starts[0])[1:]):
        text = tokenizer.decode(document[:_PROMPT_TOKENS].tolist(), skip_special_tokens=True).rstrip("\ufffd")
        if text.strip():
            return text
    return ""
