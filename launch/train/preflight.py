"""What would only fail hours later is tried before a run begins. Imports no torch."""

import os
from pathlib import Path
from uuid import uuid4

from data.tokenizer import tokenizer_of
from launch.train.run_folder import NODE, RunFolder
from launch.train.wandb_log import check_wandb
from model.hf_export import check_export_target
from model.hf_mapping import hf_class
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe


def check_recipe_to_the_end(recipe: Recipe) -> None:
    """Raise UserError where a run of the recipe would fail at its end, or at the start of its records.

    That is a model or a tokenizer that cannot be exported, where `checkpoints.export_at_end` asks for an export, and
    records for a wandb that is not installed or has no account.
    """
    if recipe.logging.wandb:
        check_wandb()
    if recipe.checkpoints.export_at_end:
        hf_class(recipe)
        tokenizer, vocab_size = tokenizer_of(recipe), recipe.model.architecture.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{tokenizer.folder}: the tokenizer has token ids up to {tokenizer.vocab_size - 1}, expected fewer "
                f"than model.model_config.vocab_size: {vocab_size}"
            )


def check_places(folder: RunFolder, recipe: Recipe) -> None:
    """Raise UserError where a run could not write its checkpoints, its records or, where it has to, its export."""
    if folder.metrics_file.is_dir():
        raise UserError(f"{folder.metrics_file}: expected a file, for the records of the run; move it away")
    for path in (folder.tensorboard, folder.logs):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"{path}: expected a folder; move it away")
    if NODE not in str(folder.checkpoints):  # each node tries its own
        _check_writable(folder.checkpoints)
    if recipe.checkpoints.export_at_end:
        check_export_target(folder.export)


def _check_writable(folder: Path) -> None:
    """Make the folder, and a file in it, which is removed again."""
    probe = folder / f".{uuid4().hex}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"written by a launch, to see whether it can save here")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{folder}: checkpoints cannot be written here ({error.strerror}); see checkpoints.checkpoints_path"
        ) from error
