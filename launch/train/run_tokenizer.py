"""A run keeps the tokenizer that it is trained with: that of a corpus is trained again when its text changes."""

from pathlib import Path

from data.tokenizer import tokenizer_folder
from launch.train.run_folder import RunFolder
from model.hf_folder import TOKENIZER_FILES
from nanotron_recipes.errors import UserError
from nanotron_recipes.files import write_atomic
from nanotron_recipes.recipe import Recipe


def keep_tokenizer(run: RunFolder, recipe: Recipe) -> None:
    """Copy the recipe's tokenizer into the folder of a run that begins; nothing where none is at hand."""
    source = _at_hand(recipe)
    if source is None:
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            write_atomic(run.tokenizer / name, (source / name).read_bytes())
        else:
            (run.tokenizer / name).unlink(missing_ok=True)  # of an earlier beginning


def run_tokenizer(run: RunFolder | None, recipe: Recipe) -> Path | None:
    """The folder of the tokenizer that a run was trained with; without a run, or of one that kept none, the recipe's,
    and None where that is not on this machine."""
    kept = run.tokenizer if run is not None else None
    return kept if kept is not None and (kept / "tokenizer.json").is_file() else _at_hand(recipe)


def _at_hand(recipe: Recipe) -> Path | None:
    try:
        folder = tokenizer_folder(recipe)
    except UserError:
        return None
    return folder if (folder / "tokenizer.json").is_file() else None
