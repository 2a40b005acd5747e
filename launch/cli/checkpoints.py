"""`nanotron-recipes checkpoints`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nanotron_recipes.errors import UserError

if TYPE_CHECKING:
    from launch.train.run_folder import RunFolder
    from nanotron_recipes.recipe import Recipe
    from parallel.checkpoint_files import Problem


def checkpoints(
    action: Annotated[
        Literal["list", "verify", "push", "pull", "prune"],
        typer.Argument(metavar="ACTION", help="list, verify, push, pull or prune."),
    ],
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run: its name, its folder, or runs/latest.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="prune: say what would be deleted, delete nothing.")
    ] = False,
    step: Annotated[
        int | None,
        typer.Option(
            "--step", help="This step. Default: push sends all that the store lacks, pull fetches the newest."
        ),
    ] = None,
) -> None:
    """List, verify, push, pull or prune the checkpoints of a run.

    `list` reads every file and shows what is kept, why, and where each copy is. `verify` names every file that is not
    as it was written, and exits with 1 if there is one; what others have put there, and parts on disks of other nodes,
    are notes. `prune` deletes what `checkpoints.keep_last` and `keep_every` allow, and where there is an `s3_upload`
    only what is in the store or was given up.

    `push` uploads what is here and not in the store, given up or not; `pull` fetches the newest step from there. Both
    verify every file, and both go on where they were interrupted.

    Examples:

    `nanotron-recipes checkpoints verify runs/latest`

    `nanotron-recipes checkpoints prune runs/latest --dry-run`

    `nanotron-recipes checkpoints pull runs/latest --step 4000`
    """
    from launch.status.runs import find_run
    from launch.train.prepare import RUNS
    from launch.train.seen_checkpoint import problems_of_step

    found = find_run(run, RUNS)
    folder, recipe = found.folder, found.recipe
    if not folder.exists():
        raise UserError(f"{folder.path}: was submitted and has not begun; expected a run that has")
    if dry_run and action != "prune":
        raise UserError(f"--dry-run: checkpoints {action} deletes nothing; expected prune")
    if step is not None and action not in ("push", "pull"):
        raise UserError(f"--step: checkpoints {action} looks at all steps; expected push or pull")
    if action in ("push", "pull"):
        from launch.cli import checkpoints_in_store

        (checkpoints_in_store.push if action == "push" else checkpoints_in_store.pull)(folder, recipe, step)
        return
    problems = {step: problems_of_step(folder, step, checksums=True) for step in folder.steps()}
    steps = [step for step in folder.steps() if step in problems]  # a run that goes on may have deleted some meanwhile
    problems = {step: problems[step] for step in steps}
    damaged = {step for step in steps if any(problem.spoils for problem in problems[step])}
    if action == "list":
        _list(folder, recipe, steps, damaged)
    elif not steps:
        print(f"{folder.checkpoints}: no checkpoint")
    elif action == "verify":
        _verify(folder, problems)
    else:
        _prune(folder, recipe, steps, damaged, dry_run)


def _list(folder: RunFolder, recipe: Recipe, steps: list[int], damaged: set[int]) -> None:
    from datetime import datetime

    from rich.console import Console
    from rich.table import Table

    from launch.cli.checkpoints_in_store import given_up_steps, steps_in_store
    from launch.train.retention import Uploading, reasons_to_keep
    from launch.train.step_line import format_bytes
    from parallel.checkpoint_files import MANIFEST_FILE

    stored, said = steps_in_store(folder, recipe, steps)
    if said:
        print(f"note: {said}", file=sys.stderr)
    if not steps and not stored:
        print(f"{folder.checkpoints}: no checkpoint")
        return
    uploads = recipe.s3_upload if recipe.s3_upload is not None and recipe.s3_upload.upload_s3_path else None
    done = given_up_steps(folder, steps) | {step for step, there in stored.items() if there.text == "yes"}
    uploading = None if uploads is None else Uploading(uploads.remove_after_upload, done)
    good = [step for step in steps if step not in damaged]
    reasons = reasons_to_keep(good, recipe.checkpoints, uploading)
    table = Table(title=str(folder.checkpoints), title_justify="left")
    for heading in ("step", "size"):
        table.add_column(heading, justify="right")
    for heading in ("when", "verified", "kept because", "here", *(["in the store"] if uploads is not None else [])):
        table.add_column(heading)
    for step in sorted({*steps, *stored}):
        there = stored.get(step)
        in_store = [] if uploads is None else ["no" if there is None else there.text]
        if step not in steps:
            size = format_bytes(there.num_bytes) if there is not None and there.num_bytes else ""
            verified = "yes" if there is not None and there.num_bytes else ""
            table.add_row(str(step), size, "", verified, "the store deletes nothing", "no", *in_store)
            continue
        try:
            files = {file: file.stat() for path in folder.step_folders(step) for file in path.iterdir()}
        except FileNotFoundError:  # a run that goes on has deleted it meanwhile
            continue
        newest = max((found.st_mtime for file, found in files.items() if file.name == MANIFEST_FILE), default=None)
        when = "unknown" if newest is None else f"{datetime.fromtimestamp(newest):%Y-%m-%d %H:%M}"
        size = format_bytes(sum(found.st_size for found in files.values()))
        verified, reason = "no" if step in damaged else "yes", reasons.get(step, "not kept: prune")
        table.add_row(str(step), size, when, verified, reason, _places(folder, step), *in_store)
    Console(soft_wrap=True).print(table)


def _places(folder: RunFolder, step: int) -> str:
    """On which nodes' disks a step is seen from here."""
    from launch.train.seen_checkpoint import manifest_of_step

    try:
        nodes = sorted({node for entry in manifest_of_step(folder, step).files for node in entry.nodes})
    except UserError:
        nodes = []
    return f"on {', '.join(nodes)}" if nodes else "yes"


def _verify(folder: RunFolder, problems: dict[int, list[Problem]]) -> None:
    from launch.train.seen_checkpoint import unseen_nodes

    for step, found in problems.items():
        for problem in found:
            print(f"{'' if problem.spoils else 'note: '}{folder.checkpoints / str(step)}: {problem}")
        nodes = unseen_nodes(folder, step)
        if nodes:
            print(f"note: {folder.checkpoints / str(step)}: parts on {', '.join(nodes)}: not seen from here")
    bad = sum(any(problem.spoils for problem in found) for found in problems.values())
    print(f"{len(problems) - bad} of {len(problems)} checkpoints are as they were written")
    if bad:
        raise typer.Exit(1)


def _prune(folder: RunFolder, recipe: Recipe, steps: list[int], damaged: set[int], dry_run: bool) -> None:
    from launch.cli.checkpoints_in_store import uploading_of
    from launch.train.checkpoint_owner import refuse_what_others_have
    from launch.train.retention import delete_checkpoint, prunable_steps
    from launch.train.run_lock import holder_of

    removes = recipe.s3_upload is not None and recipe.s3_upload.remove_after_upload
    if recipe.checkpoints.keep_last is None and not removes:
        print("nothing to delete: checkpoints.keep_last is null, which keeps all")
        return
    refuse_what_others_have(folder)
    holder = holder_of(folder.path)
    if holder is not None and not dry_run:
        raise UserError(f"{folder.path}: process {holder.pid} trains this run, and deletes its old checkpoints itself")
    deleted = prunable_steps(steps, damaged, recipe.checkpoints, uploading_of(folder, recipe, steps))
    for step in deleted:
        left = [] if dry_run else delete_checkpoint(folder, step)
        print(f"{'would delete' if dry_run else 'deleted'} {folder.checkpoints / str(step)}")
        for path in left:
            print(f"left {path}: no save wrote it")
    if not deleted:
        print("nothing to delete: the policy keeps every checkpoint")
