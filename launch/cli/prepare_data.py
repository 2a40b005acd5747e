"""What `pretrain` brings to the machine before a run: shards of a corpus, and copies of shards that lie elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from nanotron_recipes.loading import LoadedRecipe


def ensure_tokens(loaded: LoadedRecipe, console: Console) -> bool:
    """Tokenize a corpus that needs no network; otherwise the data must be there, which preparing the run checks."""
    corpus = loaded.recipe.corpus
    if corpus is None or any(source.is_remote for source in corpus.sources):
        return True
    from data.tokenization import tokenize
    from data.tokenization_process import TokenizationFailed

    try:
        tokenize(loaded.recipe, loaded.name, console=console)
    except TokenizationFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    return True


def ensure_staged(loaded: LoadedRecipe, console: Console) -> None:
    """Bring to this machine what the recipe reads from copies, where one is missing."""
    from data.sources import read_source_manifests, staged_files
    from data.staged import NotStaged
    from launch.cli.data_stage import stage_recipe

    try:
        staged_files(loaded.recipe, read_source_manifests(loaded.recipe))
    except NotStaged as error:
        console.print(f"note: {error}", markup=False, highlight=False)
        stage_recipe(loaded.recipe, console)
