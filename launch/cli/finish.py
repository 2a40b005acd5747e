"""What follows the last step of a run: export, picture, and where everything is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from launch.cli.next_line import command, generation_command, tool

if TYPE_CHECKING:
    from rich.console import Console

    from launch.train.run_folder import RunFolder
    from nanotron_recipes.recipe import Recipe


def is_trained(folder: RunFolder, recipe: Recipe) -> bool:
    """Whether the last step is taken and, where it has to be, saved: its record alone may be of a launch that died."""
    from launch.train.metrics import read_metrics
    from launch.train.prepare import is_last_step_saved, newest_step

    if is_last_step_saved(recipe):
        return newest_step(folder, recipe) >= recipe.tokens.train_steps
    steps = read_metrics(folder.metrics_file).steps if folder.metrics_file.is_file() else []
    return bool(steps) and steps[-1].step >= recipe.tokens.train_steps


def finish(folder: RunFolder, recipe: Recipe, console: Console) -> int:
    """Do what follows the last step of a run whose steps are all taken; returns the exit code."""
    from data.plan import DataPlan
    from launch.evaluate.best_effort import best_effort
    from launch.evaluate.prompts import one_prompt
    from launch.train.loss_plot import plot_losses
    from launch.train.metrics import read_metrics

    if recipe.checkpoints.export_at_end:
        from launch.evaluate.finish import ExportIsWrong, finish_run

        try:
            finish_run(folder, recipe, DataPlan.from_recipe(recipe), console)
        except ExportIsWrong as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    with best_effort("the picture of the losses"):
        plot_losses(read_metrics(folder.metrics_file), folder.path / "loss.png")
    folder.mark_completed(recipe.tokens.train_steps)
    console.print(f"run:         {folder.path}", highlight=False)
    picture = folder.path / "loss.png"
    if picture.is_file():
        console.print(f"losses:      {picture} (a picture of {folder.metrics_file.name})", highlight=False)
    console.print(f"tensorboard: {tool('tensorboard')} --logdir {folder.tensorboard}", highlight=False)
    if recipe.checkpoints.export_at_end:
        console.print(f"export:      {folder.export} (a Hugging Face folder; see its README.md)", highlight=False)
        console.print(
            f"next:        {generation_command(folder.export, one_prompt(recipe))}", highlight=False, markup=False
        )
        return 0
    saved = folder.steps()
    if saved[-1:] != [recipe.tokens.train_steps]:
        newest = f"the newest is of step {saved[-1]}" if saved else "none"
        console.print(f"checkpoint:  {newest}: checkpoints.save_final_state is false", highlight=False)
    words = ["export", folder.name, "OUT", "--verify"] if saved else ["status", folder.name]
    console.print(f"next:        {command('nanotron-recipes', *words)}", highlight=False)
    return 0
