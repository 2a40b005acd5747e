"""What `nanotron-recipes checkpoints` does with a run's store."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from launch.storage.pull import ObjectRefused, Pull
from launch.storage.remote import (
    RemoteCheckpoint,
    check_owner,
    local_identity,
    own,
    remote_checkpoints,
    remote_steps,
    run_store,
    why_not_of_this_run,
)
from launch.storage.state import Uploaded, joint_state, note_pushed
from launch.storage.store import DamagedFile, RunStore, Sending, StoreFailed
from launch.storage.task import LocalCheckpoint, UploadTask
from launch.train.retention import Uploading
from launch.train.run_folder import NODE, RunFolder
from launch.train.run_lock import holder_of
from launch.train.seen_checkpoint import problems_of_step
from launch.train.streams import describe
from nanotron_recipes.errors import UserError
from nanotron_recipes.numbers import short_number
from nanotron_recipes.recipe import Recipe

if TYPE_CHECKING:
    from data.transfer import Watch

_SHOWN = 20


@dataclass(frozen=True)
class InStore:
    """What the store has of a step that is listed.

    Attributes:
        text: for the table.
        num_bytes: of a checkpoint that is whole there; 0 without one.
    """

    text: str
    num_bytes: int


def steps_in_store(folder: RunFolder, recipe: Recipe, local: list[int]) -> tuple[dict[int, InStore], str]:
    """Of the steps that lie here and the newest that do not, where the store has anything of them or does not say; and
    what to say of it: why the store could not be asked, or how many more it has."""
    store = run_store(folder, recipe)
    if store is None:
        return {}, ""
    try:
        steps = remote_steps(store)
        only_there = [step for step in steps if step not in local]
        wanted = sorted({*(step for step in local if step in steps), *only_there[-_SHOWN:]})
        found = {step: _in_store(store, folder, step, step in local) for step in wanted}
    except StoreFailed as error:
        return dict.fromkeys(local, InStore("?", 0)), f"what the store has is not known: {error}"
    more = len(only_there) - _SHOWN
    return found, f"{more} older steps are in {store.url()} too" if more > 0 else ""


def _in_store(store: RunStore, folder: RunFolder, step: int, is_here: bool) -> InStore:
    whole = remote_checkpoints(store, step)
    if not whole:
        return InStore("in part", 0)
    size = whole[-1].manifest.num_bytes
    identity = local_identity(folder.step_folders(step)) if is_here else ""
    is_other = is_here and all(found.identity != identity for found in whole)
    return InStore("another of this step" if is_other else "yes", size)


def uploading_of(folder: RunFolder, recipe: Recipe, steps: list[int]) -> Uploading | None:
    """What `prune` may delete as far as the store is concerned; None where nothing is uploaded. Exits with 1 where the
    store does not answer: then nothing is known to be safe."""
    store = run_store(folder, recipe)
    if store is None or recipe.s3_upload is None:
        return None
    done = given_up_steps(folder, steps)
    with _failing():
        for step in steps:
            identity = local_identity(folder.step_folders(step))
            done |= {step} if any(found.identity == identity for found in remote_checkpoints(store, step)) else set()
    return Uploading(recipe.s3_upload.remove_after_upload, done)


def given_up_steps(folder: RunFolder, steps: list[int]) -> set[int]:
    """Of steps that lie here, those whose upload was given up. One that was trained again since then is another one."""
    joint = joint_state(folder.path)
    given_up = joint.given_up if joint else {}
    return {step for step in steps if (step, local_identity(folder.step_folders(step))) in given_up}


def push(folder: RunFolder, recipe: Recipe, only: int | None) -> None:
    """Upload what is not in the store. Exits with 1 where that could not be done whole."""
    store = _require_store(folder, recipe)
    _require_nobody_trains(folder, "uploads its checkpoints itself")
    steps = [step for step in folder.steps() if only in (None, step)]
    if not steps:
        raise UserError(f"{folder.checkpoints}: no checkpoint{'' if only is None else f' of step {only}'}")
    bad = 0
    with _failing():
        own(store, folder)
        for step in steps:
            bad += not _push_step(folder, recipe, step)
    if bad:
        raise typer.Exit(1)
    print(f"next: nanotron-recipes checkpoints list {folder.path}")


def _push_step(folder: RunFolder, recipe: Recipe, step: int) -> bool:
    assert recipe.s3_upload is not None
    try:
        one = LocalCheckpoint.read(step, folder.step_folders(step))
        task = UploadTask(_require_store(folder, recipe), one, "", (), recipe.s3_upload.workers)
        place = task.store.url(f"{step}/{one.identity}")
        if task.is_whole():
            print(f"{place}: was there")
            return True
        with _progress(task.num_bytes()) as watch:
            store = RunStore(recipe.s3_upload, folder.name, sending=Sending(watch))
            is_whole = UploadTask(store, one, "", (), recipe.s3_upload.workers).send()
    except (DamagedFile, UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    if is_whole:
        note_pushed(folder.path, Uploaded(step, one.identity, 0.0, one.manifest.num_bytes, time.time()))
        print(f"{place}: uploaded and read back, {short_number(one.manifest.num_bytes)} bytes")
    else:
        print(f"{place}: what is here is uploaded; call this on the nodes that have the other parts too")
    return is_whole


def pull(folder: RunFolder, recipe: Recipe, only: int | None) -> None:
    """Fetch the newest step, or one, from the store to this machine. Exits with 1 where the store gives up."""
    from data.transfer import TransferFailed

    if NODE in str(folder.checkpoints):
        import socket

        folder = RunFolder.of(folder.path.parent, folder.name, recipe, socket.gethostname())
    store = _require_store(folder, recipe)
    _require_nobody_trains(folder, "fetches what it needs when it starts")
    with _failing():
        check_owner(store, folder, folder.header().run)
        found = _choose(store, folder, only)
    place = folder.checkpoints / str(found.step)
    is_here = local_identity([place]) == found.identity
    if is_here and not any(problem.spoils for problem in problems_of_step(folder, found.step, checksums=True)):
        print(f"{place}: is here, every file as it was written")
        return
    wanted = Pull(store, found, place)
    try:
        with _progress(found.manifest.num_bytes) as watch:
            come = wanted.run(watch)
    except ObjectRefused as error:
        raise UserError(f"{error}{_kept(wanted)}{_older(store, folder, found.step)}") from None
    except (TransferFailed, OSError) as error:
        reason = str(error) if isinstance(error, TransferFailed) else f"{place}: {describe(error)}"
        print(f"error: {reason}{_kept(wanted)}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"{place}: fetched and verified, {short_number(come)} bytes")
    print(f"next: nanotron-recipes pretrain {folder.recipe_file} --run {folder.name}")


def _kept(wanted: Pull) -> str:
    """What a pull that failed has left."""
    return (
        f"; {wanted.partial} keeps what has come, and the next pull goes on from it" if wanted.partial.is_dir() else ""
    )


def _older(store: RunStore, folder: RunFolder, than: int) -> str:
    """Which step can be had instead."""
    try:
        step = _choose(store, folder, None, than=than).step
    except (StoreFailed, UserError):
        return ""
    return f"; step {step} is whole there too: nanotron-recipes checkpoints pull {folder.path} --step {step}"


def _choose(store: RunStore, folder: RunFolder, only: int | None, than: int | None = None) -> RemoteCheckpoint:
    """The step `only`, else the newest, of those that are older `than` one; raises UserError where there is none."""
    reason = "no checkpoint of this run is whole there"
    for step in reversed(remote_steps(store)):
        if only not in (None, step) or (than is not None and step >= than):
            continue
        for found in remote_checkpoints(store, step):
            why_not = why_not_of_this_run(store, found, folder)
            if not why_not:
                return found
            reason = f"step {step}: {why_not}"
    raise UserError(f"{store.url('' if only is None else str(only))}: {reason}")


def _require_store(folder: RunFolder, recipe: Recipe) -> RunStore:
    store = run_store(folder, recipe)
    if store is None:
        raise UserError(f"{folder.recipe_file}: s3_upload.upload_s3_path: expected s3://bucket/prefix, there is none")
    return store


def _require_nobody_trains(folder: RunFolder, meanwhile: str) -> None:
    holder = holder_of(folder.path)
    if holder is not None:
        raise UserError(f"{folder.path}: process {holder.pid} on {holder.host} trains this run, and {meanwhile}")


@contextmanager
def _progress(num_bytes: int) -> Iterator[Watch]:
    from data.transfer import Watch
    from launch.cli.transfer_progress import transfer_progress

    def note(line: str) -> None:
        print(f"note: {line}; trying again", file=sys.stderr)

    with transfer_progress(num_bytes) as advance:
        yield Watch(advance, note)


@contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except StoreFailed as error:
        if error.is_refusal:
            raise UserError(f"s3_upload.upload_s3_path: {error}") from None
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
