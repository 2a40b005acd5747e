"""Resuming from the store: all ranks agree on what it has, and each disk takes its share of a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launch.storage.pull import Pull
from launch.storage.remote import RemoteCheckpoint, remote_checkpoints, remote_steps, run_store, why_not_of_this_run
from launch.storage.state import joint_state
from launch.storage.store import RunStore, StoreFailed
from launch.train.run_folder import RunFolder
from nanotron_recipes.recipe import Recipe

if TYPE_CHECKING:
    from parallel.checkpoint_disks import Disks


class StoreUnreachable(RuntimeError):
    """Nothing can be resumed without the store, and it does not answer: another start may find that it does."""


@dataclass(frozen=True)
class StoredSteps:
    """What the store has of a run; the same on all ranks but for `store`.

    Attributes:
        steps: those that it has anything of, ascending.
        trouble: why it could not be asked; empty where it was, or nothing is uploaded.
        is_needed: whether steps of this run were uploaded.
    """

    steps: tuple[int, ...] = ()
    trouble: str = ""
    is_needed: bool = False
    store: RunStore | None = field(default=None, repr=False)


def stored_steps(folder: RunFolder, recipe: Recipe) -> StoredSteps:
    """Ask the store; every rank calls this."""
    from parallel.together import gather, rank_and_size

    store = run_store(folder, recipe)
    if store is None:
        return StoredSteps()
    found: tuple[tuple[int, ...], str, bool] = ((), "", False)
    if rank_and_size()[0] == 0:
        found = _ask(store, folder)
    steps, trouble, is_needed = gather(found)[0]
    return StoredSteps(steps, trouble, is_needed, store)


def _ask(store: RunStore, folder: RunFolder) -> tuple[tuple[int, ...], str, bool]:
    try:
        return tuple(remote_steps(store)), "", True
    except StoreFailed as error:
        joint = joint_state(folder.path)
        return (), str(error), joint is not None and bool(joint.uploaded)


def bring_step(stored: StoredSteps, step: int, folder: RunFolder, data: Callable[[int], str], disks: "Disks") -> str:
    """Bring a step to the disks of this launch, a share to each; every rank calls this.

    Args:
        folder: as this rank's node sees it.
        data: the fingerprint of what is read up to a step.

    Returns:
        Why that could not be done; empty where it was.
    """
    from parallel.together import FailedTogether, files_group, gather, together

    assert stored.store is not None
    store = stored.store
    chosen: tuple[RemoteCheckpoint | None, str] = (None, "")
    if disks.rank == 0:
        chosen = _choose(store, step, folder, data)
    found, reason = gather(chosen)[0]
    if found is None:
        return reason
    checkpoint = found
    share = disks.here, len(disks.names)
    pull = Pull(store, checkpoint, folder.checkpoints / str(step), share)
    try:
        with files_group() as group:
            together(lambda: pull.run() if disks.is_leader else 0, group)
    except FailedTogether as failure:
        return f"it could not be fetched from {store.url(checkpoint.folder)}: {failure}"
    return ""


def _choose(
    store: RunStore, step: int, folder: RunFolder, data: Callable[[int], str]
) -> tuple[RemoteCheckpoint | None, str]:
    reason = f"{store.url(str(step))}: not all of it was uploaded"
    try:
        for found in remote_checkpoints(store, step):
            why_not = why_not_of_this_run(store, found, folder, data)
            if not why_not:
                return found, ""
            reason = f"{store.url(found.folder)}: {why_not}"
    except StoreFailed as error:
        return None, str(error)
    return None, reason
