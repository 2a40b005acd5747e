"""What `pretrain` brings to the machine before a run: shards of a corpus, and copies of shards that lie elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from nanotron_recipes.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from launch.train.run_folder import RunFolder
    from nanotron_recipes.loading import LoadedRecipe
    from nanotron_recipes.recipe import Recipe


def ensure_tokens(loaded: LoadedRecipe, console: Console) -> bool:
    """Tokenize a corpus that needs no network; otherwise the data must be there, which preparing the run checks."""
    if loaded.recipe.corpus is None or _needs_network(loaded.recipe):
        return True
    from data.tokenization import tokenize
    from data.tokenization_process import TokenizationFailed

    try:
        tokenize(loaded.recipe, loaded.name, console=console)
    except TokenizationFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    return True


def _needs_network(recipe: Recipe) -> bool:
    return recipe.corpus is not None and any(source.is_remote for source in recipe.corpus.sources)


def refuse_other_text(folder: RunFolder, recipe: Recipe) -> None:
    """Raise UserError where a run has steps and the text that it was trained on has changed: made again, the shards
    would be other data, and no run that has read them could go on."""
    from data.tokenization import look_at_text

    if _needs_network(recipe) or not folder.exists() or not folder.steps():
        return
    outdated = look_at_text(recipe).outdated
    if outdated:
        raise UserError(
            f"{folder.path}: {outdated[0]}, and the run has been trained on what was there; put the text back, or give "
            "the new text a corpus.path and a run (--run) of its own"
        )


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
