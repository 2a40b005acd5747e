"""`nanotron-recipes pretrain`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launch.cli.options import OverrideOption, RecipeArgument
from nanotron_recipes.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from launch.train.prepare import PreparedRun
    from nanotron_recipes.loading import LoadedRecipe


def pretrain(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="Start, resume or find complete this run.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of a Slurm cluster.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="Ranks on a node; default: the GPUs here, or general.cpu_ranks_per_node.")
    ] = None,
    launcher: Annotated[
        Literal["auto", "local", "slurm"], typer.Option(help="auto: slurm when --nodes is given, else this machine.")
    ] = "auto",
    stop_after: Annotated[int | None, typer.Option(min=1, metavar="STEP", help="Save and end after this step.")] = None,
) -> None:
    """Train a recipe: tokenize if needed, train, export, verify, generate. Called again, it goes on where it stopped.

    Examples:

    `nanotron-recipes pretrain tiny`

    `nanotron-recipes pretrain tiny --run mine --set parallelism.tp=2 --stop-after 100`
    """
    from rich.console import Console

    from launch.cluster.slurm import require_sbatch
    from launch.train.prepare import check_trainable
    from nanotron_recipes.loading import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if launcher == "slurm" or (launcher == "auto" and nodes is not None):
        require_sbatch()
        raise UserError("--nodes: submitting to Slurm is not available yet; start torchrun in a job of your own")
    if nodes not in (None, 1):
        raise UserError(f"--nodes {nodes}: --launcher local trains on this machine alone")
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    check_trainable(loaded.recipe)
    console = Console(soft_wrap=True)
    num_ranks = _num_ranks(loaded, gpus_per_node)
    _ensure_tokens(loaded, console)
    raise typer.Exit(_train(loaded, run, num_ranks, stop_after, console))


def _num_ranks(loaded: LoadedRecipe, ranks_per_node: int | None) -> int:
    """Ranks to start here, after checking that the recipe can be trained on so many."""
    from nanotron_recipes.topology import local_world_size, resolve_topology

    if ranks_per_node is None:
        ranks_per_node = _gpus_here()
    num_ranks = local_world_size(loaded.recipe, ranks_per_node or None)
    resolve_topology(loaded.recipe, num_ranks)
    return num_ranks


def _gpus_here() -> int:
    """GPUs of this machine without importing torch: 0 where the driver is not loaded."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _ensure_tokens(loaded: LoadedRecipe, console: Console) -> None:
    """Tokenize a corpus that needs no network; otherwise the data must be there, which preparing the run checks."""
    corpus = loaded.recipe.corpus
    if corpus is not None and not any(source.needs_network for source in corpus.sources):
        from data.tokenization import tokenize

        tokenize(loaded.recipe, loaded.name, console=console)


def _train(loaded: LoadedRecipe, run: str | None, num_ranks: int, stop_after: int | None, console: Console) -> int:
    from launch.cluster.local import launch_local
    from launch.train.prepare import RunRequest, prepare_run

    prepared = prepare_run(RunRequest(loaded, run))
    with prepared.lock:
        if prepared.state == "complete":
            console.print(f"{prepared.folder.path} is complete; next: another --run, or more tokens.train_steps")
            return 0
        for change in prepared.changes:
            console.print(f"changed: {change}", markup=False)
        if prepared.step < prepared.recipe.tokens.train_steps:
            arguments = [str(prepared.folder.recipe_file), "--launch-id", prepared.launch_id]
            if stop_after is not None:
                arguments += ["--stop-after", str(stop_after)]
            code = launch_local(
                arguments, num_ranks, prepared.folder.logs, threads_per_rank=1, launch_id=prepared.launch_id
            )
            if code != 0:
                return code
        return _finish(prepared, console)


def _finish(prepared: PreparedRun, console: Console) -> int:
    """What follows the last step; a run that was stopped before it only says how to go on."""
    from data.plan import DataPlan
    from launch.train.loss_plot import plot_losses
    from launch.train.metrics import read_metrics

    folder, recipe = prepared.folder, prepared.recipe
    metrics = read_metrics(folder.metrics_file) if folder.metrics_file.is_file() else None
    if metrics is None or not metrics.steps or metrics.steps[-1].step < recipe.tokens.train_steps:
        console.print(f"next: the same command with --run {folder.name} goes on")
        return 0
    if recipe.checkpoints.export_at_end:
        from launch.evaluate.finish import finish_run

        finish_run(folder, recipe, DataPlan.from_recipe(recipe), console)
    plot_losses(metrics, folder.path / "loss.png")
    folder.mark_completed(recipe.tokens.train_steps)
    console.print(f"run:         {folder.path}", highlight=False)
    console.print(f"losses:      {folder.path / 'loss.png'} (a picture of {folder.metrics_file.name})", highlight=False)
    console.print(f"tensorboard: tensorboard --logdir {folder.tensorboard}", highlight=False)
    if recipe.checkpoints.export_at_end:
        console.print(f"export:      {folder.export} (a Hugging Face folder; see its README.md)", highlight=False)
        console.print(
            f'next:        python -c "from transformers import pipeline; '
            f"print(pipeline('text-generation', '{folder.export}')('Compute 47+86?\\n'))\"",
            highlight=False,
            markup=False,
        )
    else:
        console.print(f"next:        nanotron-recipes export {folder.name} OUT --verify", highlight=False)
    return 0
