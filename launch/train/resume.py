"""Where a launch goes on: the newest checkpoint whose every byte is as it was written, or another run's.

Imports no torch at module level: what is said before a launch is said at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from glob import escape, glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.train.run_folder import NODE, RunFolder, on_node
from launch.train.seen_checkpoint import manifest_of_step, problems_of_step
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe
from parallel.checkpoint_files import (
    MANIFEST_FILE,
    PARTIAL_SUFFIX,
    STEP_NAME,
    Manifest,
    Problem,
    read_manifest,
    what_is_in_the_way,
)

if TYPE_CHECKING:
    from launch.storage.resume import StoredSteps
    from parallel.buckets import Bucket
    from parallel.checkpoint_disks import Disks
    from parallel.checkpoint_search import SoundCheckpoint
    from parallel.optimizer import FlatAdamW

DataThrough = Callable[[int], str]
"""The fingerprint of what is read up to a step: `data.plan.DataPlan.fingerprint_through`."""


@dataclass(frozen=True)
class Start:
    """Where training begins.

    Attributes:
        checkpoint: what is read; None draws new weights.
        folder: where it lies on this rank's disk, if it does.
        disks: which ranks see the same folder.
        first_step: the first step to train.
        load_optimizer: whether AdamW's moments and counter are read as well.
        refused: steps of this run whose checkpoints are damaged -> what is wrong with them.
        scratch: where to put what is fetched from other nodes, when the checkpoint is another run's.
        is_pulled: whether it came from the store just now.
        trouble: why the store could not be asked for a newer one; empty where it was, or nothing is uploaded.
    """

    checkpoint: "SoundCheckpoint | None"
    folder: Path
    disks: "Disks"
    first_step: int
    load_optimizer: bool
    refused: dict[int, str]
    scratch: Path | None = None
    is_pulled: bool = False
    trouble: str = ""

    def lines(self) -> list[str]:
        """What a person should know about it."""
        said = [f"checkpoint of step {step} refused: {reason}" for step, reason in self.refused.items()]
        said += [f"weights from {self.folder}"] if self.scratch is not None else []
        said += [f"{self.folder}: fetched from the store, and verified"] if self.is_pulled else []
        return [*said, *([f"whether the store has a newer one is not known: {self.trouble}"] if self.trouble else [])]


def newest_sound_step(folder: RunFolder, *, checksums: bool = False) -> int:
    """The step of the newest checkpoint that verifies (without `checksums`: by its manifest and sizes), 0 without any.

    Raises:
        UserError: there are checkpoints and none of them is sound.
    """
    steps, reason = folder.steps(), ""
    for step in reversed(steps):
        reason = _reason(problems_of_step(folder, step, checksums=checksums))
        if not reason:
            return step
    if steps:
        raise UserError(_none_is_sound(folder, steps[0], reason))
    return 0


def find_start(folder: RunFolder, recipe: Recipe, data: DataThrough, disks: "Disks", node: str) -> Start:
    """Where this launch goes on; every rank calls this, each reads its share of the files, and all agree.

    The newest step that is good on the disks is taken, or is whole in the store, from where it is brought here.

    Args:
        folder: as this rank's node sees it.
        disks: which ranks share the disk of its checkpoints.
        node: the name of this rank's node.

    Raises:
        UserError: no checkpoint can be used, or it is of a run that has read other data than `data` says.
        StoreUnreachable: only the store can have one, and it does not answer.
    """
    from launch.storage.resume import StoreUnreachable, stored_steps
    from parallel.checkpoint_disks import disk_per_node
    from parallel.checkpoint_search import search_checkpoint

    stored = stored_steps(folder, recipe)
    step, sound, refused, pulled = _newest_sound(folder, stored, data, disks)
    own = folder.checkpoints / str(step)
    if sound is not None:
        _require_data(own, sound.manifest, data)
        return Start(sound, own, disks, step + 1, True, refused, None, pulled, stored.trouble)
    if stored.trouble and stored.is_needed:
        raise StoreUnreachable(f"no checkpoint is on the disks, and the store does not answer: {stored.trouble}")
    if refused:
        oldest, reason = list(refused.items())[-1]
        raise UserError(_none_is_sound(folder, oldest, reason))
    wanted = recipe.checkpoints
    path = on_node(wanted.resume_checkpoint_path, node)
    if path is None:
        return Start(None, own, disks, 1, True, refused)
    disks = disk_per_node(node)
    parent, reason = search_checkpoint(Path(path), disks)
    if parent is None:
        raise UserError(f"checkpoints.resume_checkpoint_path: {path}: {reason}")
    step = parent.manifest.step if wanted.load_lr_scheduler else 0
    scratch = folder.checkpoints / f"{parent.manifest.step}{PARTIAL_SUFFIX}"
    return Start(parent, Path(path), disks, step + 1, wanted.load_optimizer, refused, scratch)


def _newest_sound(
    folder: RunFolder, stored: "StoredSteps", data: DataThrough, disks: "Disks"
) -> tuple[int, "SoundCheckpoint | None", dict[int, str], bool]:
    """The newest step on the disks or in the store that can be used (0 and None without one), why each one before it
    was refused, and whether it came from the store; every rank calls this."""
    from launch.storage.resume import bring_step
    from parallel.checkpoint_search import search_checkpoint, steps_on_all_disks

    here, refused = steps_on_all_disks(folder.steps()), dict[int, str]()
    for step in sorted({*here, *stored.steps}, reverse=True):
        place, reasons = folder.checkpoints / str(step), []
        if step in here:
            sound, reason = search_checkpoint(place, disks, step=step)
            if sound is not None:
                return step, sound, refused, False
            reasons.append(reason)
        if step in stored.steps:
            reason = bring_step(stored, step, folder, data, disks)
            if not reason:
                sound, reason = search_checkpoint(place, disks, step=step)
                if sound is not None:
                    return step, sound, refused, True
            reasons.append(reason)
        refused[step] = "; ".join(reasons)
    return 0, None, refused, False


def refuse_foreign_steps(folder: RunFolder, start: Start, last: int) -> None:
    """Raise UserError, on all ranks, where something has the name of a step that this launch may save, and is no
    checkpoint; every rank calls this.

    Args:
        folder: as this rank's node sees it.
        last: the last step of the run.
    """
    from parallel.together import FailedTogether, together

    first = start.first_step if start.first_step > 1 else 0

    def look() -> str:
        steps = [path for path in folder.checkpoints.iterdir() if STEP_NAME.fullmatch(path.name)]
        mistakes = [what_is_in_the_way(path) for path in sorted(steps) if first <= int(path.name) <= last]
        return next(filter(None, mistakes), "")

    try:
        mistake = next(filter(None, together(look)), "")
    except FailedTogether as failure:
        raise UserError(f"{folder.checkpoints}: cannot be read: {failure}") from failure
    if mistake:
        raise UserError(mistake)


def load_start(start: Start, buckets: "list[Bucket]", optimizer: "FlatAdamW") -> dict[str, Any]:
    """Read what `find_start` found into this rank's buffers, from other nodes' disks too; every rank calls this.

    Returns:
        The `state` it was saved with.

    Raises:
        UserError: it cannot be read into this model, or a part could not be brought to the node that needs it.
    """
    from parallel.checkpoint import load_checkpoint, wanted_tensors
    from parallel.checkpoint_fetch import fetch_parts
    from parallel.together import FailedTogether, files_group

    assert start.checkpoint is not None
    place = start.folder
    if len(start.disks.names) > 1:
        tensors = partial(wanted_tensors, buckets=buckets, optimizer=optimizer, load_optimizer=start.load_optimizer)
        try:
            with files_group() as files:
                place = fetch_parts(start.checkpoint, start.folder, tensors, start.disks, files, start.scratch)
        except FailedTogether as failure:
            raise UserError(f"{start.folder}: its parts could not be fetched from the other nodes: {failure}") from None
    return load_checkpoint(place, buckets, optimizer, load_optimizer=start.load_optimizer)


def gather_on_first_node(folder: RunFolder, step: int, disks: "Disks") -> None:
    """Bring every part of a step's checkpoint to the first node, where it is exported; every rank calls this.

    Raises:
        SaveFailed: on all ranks: a part is lost, or could not be brought there.
    """
    from parallel.checkpoint_fetch import bring_all
    from parallel.checkpoint_search import search_checkpoint
    from parallel.checkpoint_writer import SaveFailed
    from parallel.together import FailedTogether, files_group

    if len(disks.names) == 1:
        return
    place = folder.checkpoints / str(step)
    sound, reason = search_checkpoint(place, disks, step=step)
    if sound is None:
        raise SaveFailed(f"the checkpoint of step {step} cannot be exported: {reason}")
    try:
        with files_group() as files:
            bring_all(sound, place, disks.of_rank[0], disks, files)
    except FailedTogether as failure:
        raise SaveFailed(f"{place}: its parts could not be brought to node {disks.names[0]}: {failure}") from None


def require_data(folder: RunFolder, step: int, data: DataThrough) -> None:
    """Raise UserError where a run's checkpoint was not trained on the data that its recipe reads now."""
    _require_data(folder.step_folders(step)[0], manifest_of_step(folder, step), data)


def parent_checkpoint(recipe: Recipe) -> tuple[Path, Manifest] | None:
    """The checkpoint that the recipe starts from: a folder of it that is seen from here, and what it says of itself;
    None where the recipe starts from nothing.

    Raises:
        UserError: the key names no complete checkpoint.
    """
    text = recipe.checkpoints.resume_checkpoint_path
    if text is None:
        return None
    seen = [Path(found) for found in sorted(glob(escape(text).replace(NODE, "*")))] or [Path(text)]
    for path in seen:
        if (path / MANIFEST_FILE).is_file():
            return path, read_manifest(path)
    raise UserError(
        f"checkpoints.resume_checkpoint_path: {text}: expected the folder of a step, <run>/checkpoints/<step>"
    )


def _require_data(checkpoint: Path, manifest: Manifest, data: DataThrough) -> None:
    now = data(manifest.step)
    if manifest.data != now:
        raise UserError(
            f"{checkpoint}: it was trained on other data: fingerprint {manifest.data[:12] or 'none'}, not {now[:12]}"
        )


def _reason(problems: list[Problem]) -> str:
    spoiling = [problem for problem in problems if problem.spoils]
    more = f" (and {len(spoiling) - 1} more)" if len(spoiling) > 1 else ""
    return f"{spoiling[0]}{more}" if spoiling else ""


def _none_is_sound(folder: RunFolder, step: int, reason: str) -> str:
    return (
        f"{folder.checkpoints}: no checkpoint can be used (step {step}: {reason}); "
        "move them away to begin again, or start another run with --run"
    )
