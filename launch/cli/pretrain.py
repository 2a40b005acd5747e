"""`nanotron-recipes pretrain`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launch.cli.next_line import command
from launch.cli.options import OverrideOption, RecipeArgument
from launch.cli.prepare_data import ensure_staged, ensure_tokens, refuse_other_text
from nanotron_recipes.errors import UserError, shorten, show_value
from nanotron_recipes.machine import check_local_ranks
from nanotron_recipes.numbers import counted

if TYPE_CHECKING:
    from rich.console import Console

    from launch.cluster.submit import Submission
    from launch.train.prepare import PreparedRun
    from nanotron_recipes.loading import LoadedRecipe
    from nanotron_recipes.recipe import Recipe

_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONGEST_NAME = 100
"""Characters of a recipe's name; a run's is that and a number."""
_LONGEST_SHOWN = 80


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
        int | None,
        typer.Option(
            min=0,
            help="Ranks on a node; 0: on its CPUs; default: the NVIDIA GPUs here, or its CPUs; of a job the recipe's.",
        ),
    ] = None,
    launcher: Annotated[
        Literal["auto", "local", "slurm"], typer.Option(help="auto: slurm when --nodes is given, else this machine.")
    ] = "auto",
    stop_after: Annotated[int | None, typer.Option(min=1, metavar="STEP", help="Save and end after this step.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job's script; nothing is submitted.")] = False,
    after: Annotated[
        str | None, typer.Option(metavar="JOB", help="Start the job when this one has ended with exit code 0.")
    ] = None,
) -> None:
    """Train a recipe: tokenize if needed, train, export, verify, generate. Called again, it goes on where it stopped;
    a run that was given a name goes on with --run.

    With --nodes it submits a Slurm job that does the same on a cluster, and goes back into the queue by itself.

    Examples:

    `nanotron-recipes pretrain tiny`

    `nanotron-recipes pretrain tiny --run mine --set parallelism.tp=2 --stop-after 100`

    `nanotron-recipes pretrain smollm3-3b --nodes 8 --dry-run`
    """
    from rich.console import Console

    from launch.cluster.submit import Submission
    from launch.train.prepare import RUNS, check_trainable
    from launch.train.run_folder import RunFolder, checked_name
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
    console = Console(soft_wrap=True, stderr=dry_run)
    if launcher == "slurm" or (launcher == "auto" and nodes is not None):
        if node_names is not None:
            raise UserError("--node-names: names nodes that are played here; expected --launcher local with it")
        request = Submission(loaded, nodes or 1, run, gpus_per_node, stop_after, after)
        raise typer.Exit(_submit(request, console, dry_run=dry_run))
    if dry_run or after is not None:
        option = "--dry-run" if dry_run else "--after"
        raise UserError(f"{option}: is about a Slurm job; expected --nodes N or --launcher slurm with it")
    check_trainable(loaded.recipe, loaded.path.name)
    played = _played_nodes(nodes, node_names)
    ranks = _choose_ranks(loaded.recipe, gpus_per_node, played)
    for note in (*loaded.notes, *ranks.notes):
        console.print(f"note: {note}", markup=False, highlight=False)
    if run is not None:
        refuse_other_text(RunFolder.of(RUNS, run, loaded.recipe), loaded.recipe)
    if not ensure_tokens(loaded, console):
        raise typer.Exit(1)
    ensure_staged(loaded, console)
    raise typer.Exit(_train(loaded, run, ranks, played, stop_after, console))


def _submit(request: Submission, console: Console, *, dry_run: bool) -> int:
    from launch.cluster.submit import job_for, submit

    for note in request.loaded.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    if dry_run:
        print(job_for(request), end="")
        return 0
    for line in submit(request):
        console.print(line, markup=False, highlight=False)
    return 0


def _played_nodes(nodes: int | None, names: str | None) -> list[str]:
    """The nodes that this machine plays; none where it is just itself."""
    if names is None:
        return [f"node{number}" for number in range(1, nodes + 1)] if nodes is not None and nodes > 1 else []
    found = names.split(",")
    for name in found:
        if not _NODE_NAME.fullmatch(name):
            raise UserError(
                f"--node-names {shorten(names, _LONGEST_SHOWN)}: {show_value(name)}: expected 1 to 64 letters a to z, "
                "digits, '.', '_' and '-', beginning with a letter or digit"
            )
    if len(set(found)) < len(found) or (nodes is not None and nodes != len(found)):
        expected = "different names" if nodes is None else f"{nodes} different names, as many as --nodes"
        raise UserError(f"--node-names {shorten(names, _LONGEST_SHOWN)}: expected {expected}")
    return found


@dataclass(frozen=True)
class _Ranks:
    """What is started here; `notes` tell where dp auto cannot have all GPUs, which nobody asked for by number."""

    number: int
    on_cpu: bool
    notes: list[str]


def _choose_ranks(recipe: Recipe, asked: int | None, played: list[str]) -> _Ranks:
    """Ranks to start here, after checking that the recipe can be trained on so many, and that each has a GPU where they
    are to have some. Without GPUs that are counted they are all on the CPUs, whatever torch may find."""
    from launch.cluster.threads import gpus_here
    from nanotron_recipes.topology import largest_world_size, local_world_size, resolve_topology

    nodes, notes = max(1, len(played)), list[str]()
    here = gpus_here()
    offered = here if asked is None else asked
    num_ranks = local_world_size(recipe, offered or None, nodes)
    if asked is None and offered and nodes == 1:
        try:
            resolve_topology(recipe, num_ranks)
        except UserError as error:
            num_ranks = largest_world_size(recipe, num_ranks)
            notes.append(f"{num_ranks} of the {offered} GPUs here are used; on all of them: {error}")
    if asked and asked * nodes > num_ranks:
        parallelism = recipe.parallelism
        raise UserError(
            f"--gpus-per-node {asked}: expected dp × pp × tp ranks, and with parallelism.dp {parallelism.dp}, "
            f"pp {parallelism.pp} and tp {parallelism.tp} that is {num_ranks}"
        )
    if num_ranks % nodes:
        raise UserError(f"{num_ranks} ranks: expected a multiple of the {nodes} nodes {', '.join(played)}")
    check_local_ranks(num_ranks)
    if offered and here and num_ranks > here:
        raise UserError(
            f"parallelism: dp × pp × tp is {counted(num_ranks, 'rank')}; expected at most {here} on this machine, one "
            "for each of its GPUs, or --gpus-per-node 0 (on its CPUs)"
        )
    resolve_topology(recipe, num_ranks)
    return _Ranks(num_ranks, offered == 0, notes)


def _train(
    loaded: LoadedRecipe,
    run: str | None,
    ranks: _Ranks,
    nodes: list[str],
    stop_after: int | None,
    console: Console,
) -> int:
    from launch.cluster.local import launch_local
    from launch.cluster.threads import threads_per_rank
    from launch.train.prepare import RunRequest, prepare_run, reason_not_to_train

    prepared = prepare_run(RunRequest(loaded, run))
    with prepared.lock:
        for change in prepared.changes:
            console.print(f"changed: {change}", markup=False, highlight=False)
        reason = reason_not_to_train(prepared, stop_after)
        if reason is not None:
            console.print(reason, highlight=False)
            is_whole = prepared.state != "complete" and prepared.step >= prepared.recipe.tokens.train_steps
            return _finish(prepared, console) if is_whole else 0
        # After which step is said when its checkpoint has been read.
        how = "goes on" if prepared.step else "begins"
        for note in prepared.notes:
            console.print(f"note: {note}", markup=False, highlight=False)
        console.print(f"{prepared.folder.path}: {how}; starting {counted(ranks.number, 'rank')} …", highlight=False)
        arguments = [str(prepared.folder.recipe_file), "--launch-id", prepared.launch_id]
        if stop_after is not None:
            arguments += ["--stop-after", str(stop_after)]
        code = launch_local(
            arguments,
            ranks.number,
            prepared.folder.logs,
            threads_per_rank=threads_per_rank(prepared.recipe, ranks.number, on_cpu=ranks.on_cpu),
            deterministic=prepared.recipe.general.deterministic,
            on_cpu=ranks.on_cpu,
            launch_id=prepared.launch_id,
            nodes=nodes,
        )
        return _finish(prepared, console) if code == 0 else code


def _finish(prepared: PreparedRun, console: Console) -> int:
    """What follows the last step; a run that was stopped before it only says how to go on."""
    from launch.cli.finish import finish, is_trained

    folder = prepared.folder
    if is_trained(folder, prepared.recipe):
        return finish(folder, prepared.recipe, console)
    following = command("nanotron-recipes", "pretrain", folder.recipe_file, "--run", folder.name)
    console.print(f"next: {following}", highlight=False, markup=False)
    return 0
