"""`nanotron-recipes pretrain`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launch.cli.next_line import command, generation_command, tool
from launch.cli.options import OverrideOption, RecipeArgument
from nanotron_recipes.errors import UserError
from nanotron_recipes.machine import check_local_ranks, usable_cpus

if TYPE_CHECKING:
    from rich.console import Console

    from launch.train.prepare import PreparedRun
    from nanotron_recipes.loading import LoadedRecipe
    from nanotron_recipes.recipe import Recipe

_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONGEST_NAME = 100
"""Characters of a recipe's name; a run's is that and a number."""


def pretrain(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="Start, resume or find complete this run.")] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Nodes of a Slurm cluster; with --launcher local, played here."),
    ] = None,
    node_names: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Names of the nodes played here; default: node1,node2 …"),
    ] = None,
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
    from launch.train.run_folder import checked_name
    from launch.train.streams import tolerate_lost_output
    from nanotron_recipes.loading import load_recipe

    tolerate_lost_output()
    loaded = load_recipe(recipe, overrides or [])
    if run is not None:
        checked_name(run)
    elif len(loaded.name) > _LONGEST_NAME:
        raise UserError(
            f"{loaded.path.name}: runs are named after their recipe; expected a name of at most {_LONGEST_NAME} "
            "characters, or --run NAME"
        )
    if launcher == "slurm" or (launcher == "auto" and nodes is not None):
        require_sbatch()
        raise UserError("--nodes: submitting to Slurm is not available yet; start torchrun in a job of your own")
    check_trainable(loaded.recipe, loaded.path.name)
    played = _played_nodes(nodes, node_names)
    num_ranks = _num_ranks(loaded, gpus_per_node, max(1, len(played)))
    console = Console(soft_wrap=True)
    for note in loaded.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    if not _ensure_tokens(loaded, console):
        raise typer.Exit(1)
    _ensure_staged(loaded, console)
    raise typer.Exit(_train(loaded, run, num_ranks, played, stop_after, console))


def _played_nodes(nodes: int | None, names: str | None) -> list[str]:
    """The nodes that this machine plays; none where it is just itself."""
    if names is None:
        return [f"node{number}" for number in range(1, nodes + 1)] if nodes is not None and nodes > 1 else []
    found = names.split(",")
    for name in found:
        if not _NODE_NAME.fullmatch(name):
            raise UserError(f"--node-names {names}: {name!r}: expected letters, digits, '.', '_' and '-'")
    if len(set(found)) < len(found) or (nodes is not None and nodes != len(found)):
        expected = "different names" if nodes is None else f"{nodes} different names, as many as --nodes"
        raise UserError(f"--node-names {names}: expected {expected}")
    return found


def _num_ranks(loaded: LoadedRecipe, asked: int | None, nodes: int) -> int:
    """Ranks to start here, after checking that the recipe can be trained on so many."""
    from nanotron_recipes.topology import local_world_size, resolve_topology

    recipe = loaded.recipe
    num_ranks = local_world_size(recipe, (_gpus_here() if asked is None else asked) or None, nodes)
    if asked and asked * nodes > num_ranks:
        parallelism = recipe.parallelism
        raise UserError(
            f"--gpus-per-node {asked}: expected dp × pp × tp ranks, and with parallelism.dp {parallelism.dp}, "
            f"pp {parallelism.pp} and tp {parallelism.tp} that is {num_ranks}"
        )
    check_local_ranks(num_ranks)
    resolve_topology(recipe, num_ranks)
    return num_ranks


def _gpus_here() -> int:
    """GPUs that this process may use, without importing torch: 0 where the driver is not loaded."""
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else min(present, len([gpu for gpu in visible.split(",") if gpu.strip()]))


def _threads_per_rank(recipe: Recipe, num_ranks: int) -> int | None:
    """What a CPU rank computes with: one thread where the recipe asks for several ranks a node, else its share."""
    if _gpus_here():
        return None
    return 1 if recipe.general.cpu_ranks_per_node > 1 else max(1, usable_cpus() // num_ranks)


def _ensure_tokens(loaded: LoadedRecipe, console: Console) -> bool:
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


def _ensure_staged(loaded: LoadedRecipe, console: Console) -> None:
    """Bring to this machine what the recipe reads from copies, where one is missing."""
    from data.sources import read_source_manifests, staged_files
    from data.staged import NotStaged
    from launch.cli.data_stage import stage_recipe

    try:
        staged_files(loaded.recipe, read_source_manifests(loaded.recipe))
    except NotStaged as error:
        console.print(f"note: {error}", markup=False, highlight=False)
        stage_recipe(loaded.recipe, console)


def _train(
    loaded: LoadedRecipe, run: str | None, num_ranks: int, nodes: list[str], stop_after: int | None, console: Console
) -> int:
    from launch.cluster.local import launch_local
    from launch.train.prepare import RunRequest, prepare_run, reason_not_to_train
    from launch.train.run_folder import NODE

    prepared = prepare_run(RunRequest(loaded, run))
    with prepared.lock:
        for change in prepared.changes:
            console.print(f"changed: {change}", markup=False, highlight=False)
        reason = reason_not_to_train(prepared, stop_after)
        if reason is not None:
            console.print(reason, highlight=False)
            return 0 if prepared.state == "complete" else _finish(prepared, console)
        # Which step it will be is for the ranks to find out, where nodes have disks of their own.
        after = "" if NODE in str(prepared.folder.checkpoints) else f" after step {prepared.step}"
        how = f"goes on{after}" if prepared.step else "begins"
        for note in prepared.notes:
            console.print(f"note: {note}", markup=False, highlight=False)
        ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
        console.print(f"{prepared.folder.path}: {how}; starting {ranks} …", highlight=False)
        arguments = [str(prepared.folder.recipe_file), "--launch-id", prepared.launch_id]
        if stop_after is not None:
            arguments += ["--stop-after", str(stop_after)]
        code = launch_local(
            arguments,
            num_ranks,
            prepared.folder.logs,
            threads_per_rank=_threads_per_rank(prepared.recipe, num_ranks),
            deterministic=prepared.recipe.general.deterministic,
            launch_id=prepared.launch_id,
            nodes=nodes,
        )
        return _finish(prepared, console) if code == 0 else code


def _finish(prepared: PreparedRun, console: Console) -> int:
    """What follows the last step; a run that was stopped before it only says how to go on."""
    from data.plan import DataPlan
    from launch.evaluate.best_effort import best_effort
    from launch.evaluate.prompts import one_prompt
    from launch.train.loss_plot import plot_losses
    from launch.train.metrics import read_metrics

    folder, recipe = prepared.folder, prepared.recipe
    if not _is_trained(prepared):
        console.print(
            f"next: the same command goes on, without --stop-after (or with --run {folder.name}; with make, "
            f"RUN={folder.name})",
            highlight=False,
        )
        return 0
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
    else:
        following = command("nanotron-recipes", "export", folder.name, "OUT", "--verify")
        console.print(f"next:        {following}", highlight=False)
    return 0


def _is_trained(prepared: PreparedRun) -> bool:
    """Whether the last step is taken and, where it has to be, saved: its record alone may be of a launch that died."""
    from launch.train.metrics import read_metrics
    from launch.train.prepare import is_last_step_saved, newest_step

    folder, recipe = prepared.folder, prepared.recipe
    if is_last_step_saved(recipe):
        return newest_step(folder, recipe) >= recipe.tokens.train_steps
    steps = read_metrics(folder.metrics_file).steps if folder.metrics_file.is_file() else []
    return bool(steps) and steps[-1].step >= recipe.tokens.train_steps
