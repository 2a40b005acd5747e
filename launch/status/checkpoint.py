"""A run's newest checkpoint, as its folder and its records tell; no checksum is computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.storage.remote import local_identity
from launch.storage.state import joint_state
from launch.train.metrics import Event, kept_checkpoints
from launch.train.run_folder import RunFolder
from launch.train.seen_checkpoint import manifest_of_step, problems_of_step
from nanotron_recipes.errors import UserError
from parallel.checkpoint_files import MANIFEST_FILE, Manifest


@dataclass(frozen=True)
class CheckpointStatus:
    """The newest checkpoint that was written whole."""

    step: int
    time: float | None
    """Seconds since the epoch; None where its files are not seen from here."""
    num_bytes: int
    places: list[str]
    """The folders of its files, as far as they are seen from here."""
    copies: int | None
    """Disks that each part lies on, at least; None where it is not seen from here."""
    nodes: list[str]
    """Whose disks that are; empty: one that all share."""
    in_store: bool | None
    """Whether it is whole in the store, by what the uploaders last said; None where nothing is uploaded."""
    problem: str
    """What is wrong with it, without a look at checksums; empty where nothing is."""


def newest_checkpoint(folder: RunFolder, events: Sequence[Event]) -> CheckpointStatus | None:
    """The run's newest checkpoint: what is seen from here, or the record of a newer one on disks that are not."""
    saved = kept_checkpoints(events)
    recorded = max(saved, default=None)
    steps = folder.steps()
    joint = joint_state(folder.path)
    if steps and (recorded is None or steps[-1] >= recorded or len(folder.checkpoint_folders()) == 1):
        seen = steps[-1], local_identity(folder.step_folders(steps[-1]))
        return replace(_seen(folder, steps[-1]), in_store=None if joint is None else seen in joint.uploaded)
    if recorded is None:
        return None
    uploaded = {step for step, _ in joint.uploaded}.difference(joint.waiting) if joint is not None else set()
    in_store = None if joint is None else recorded in uploaded
    unseen = "" if in_store else "its files are not seen from here"
    return CheckpointStatus(recorded, None, saved[recorded]["num_bytes"], [], None, [], in_store, unseen)


def _seen(folder: RunFolder, step: int) -> CheckpointStatus:
    places = folder.step_folders(step)
    try:
        manifest = manifest_of_step(folder, step)
    except UserError as error:
        return CheckpointStatus(step, None, 0, [str(place) for place in places], None, [], None, str(error))
    problems = [str(problem) for problem in problems_of_step(folder, step, checksums=False) if problem.spoils]
    return CheckpointStatus(
        step,
        _written(places),
        manifest.num_bytes,
        [str(place) for place in places],
        _copies(manifest),
        sorted({node for entry in manifest.files for node in entry.nodes}),
        None,
        problems[0] if problems else "",
    )


def _copies(manifest: Manifest) -> int:
    """An entry without nodes lies on every disk there is."""
    return min((len(entry.nodes) for entry in manifest.files if entry.nodes), default=1)


def _written(places: Sequence[Path]) -> float | None:
    times = [(place / MANIFEST_FILE).stat().st_mtime for place in places if (place / MANIFEST_FILE).is_file()]
    return max(times, default=None)
