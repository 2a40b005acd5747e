"""Which checkpoints of a run are kept, and why. Imports no torch."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.train.run_folder import RunFolder
from launch.train.seen_checkpoint import problems_of_step
from nanotron_recipes.schema.checkpoints import Checkpoints
from parallel.checkpoint_files import REPLACED_SUFFIX, discard


@dataclass(frozen=True)
class Uploading:
    """What a policy means where checkpoints are uploaded, and which of them nothing has to wait for any more.

    Attributes:
        keeps_one: `s3_upload.remove_after_upload`.
        done: steps that are verified in the store, or were given up.
    """

    keeps_one: bool
    done: Collection[int]

    def policy(self, policy: Checkpoints) -> Checkpoints:
        """That of a local disk: what keep_every keeps, the store has."""
        return policy.model_copy(update={"keep_every": None, "keep_last": 1 if self.keeps_one else policy.keep_last})


def reasons_to_keep(
    good_steps: Sequence[int], policy: Checkpoints, uploading: Uploading | None = None
) -> dict[int, str]:
    """For each step that is kept, why; a step without a reason may be deleted.

    Args:
        good_steps: the steps whose checkpoints verify, ascending. Damaged ones are never counted in.
        uploading: None where nothing is uploaded.
    """
    if uploading is not None:
        reasons = reasons_to_keep(good_steps, uploading.policy(policy))
        waiting = [step for step in good_steps if step not in uploading.done and step not in reasons]
        return reasons | dict.fromkeys(waiting, "not verified in the store")
    if policy.keep_last is None:
        return dict.fromkeys(good_steps, "all are kept (checkpoints.keep_last is null)")
    reasons = dict.fromkeys(good_steps[-policy.keep_last :], f"one of the last {policy.keep_last}")
    if policy.keep_every is not None:
        every = f"a multiple of {policy.keep_every}"
        reasons |= {step: every for step in good_steps if step % policy.keep_every == 0 and step not in reasons}
    reasons |= dict.fromkeys(good_steps[-1:], "the newest that verifies")
    return reasons


def prunable_steps(
    steps: Sequence[int], damaged: Collection[int], policy: Checkpoints, uploading: Uploading | None = None
) -> list[int]:
    """What the policy allows to delete; nothing while no checkpoint is good, or while all are kept."""
    good = [step for step in steps if step not in damaged]
    on_disk = policy if uploading is None else uploading.policy(policy)
    if on_disk.keep_last is None or not good:
        return []
    kept = reasons_to_keep(good, policy, uploading)
    return [step for step in steps if step not in kept]


def damaged_steps(folder: RunFolder, steps: Sequence[int], *, checksums: bool) -> set[int]:
    """The steps whose files are not as they were written (sizes only without `checksums`)."""
    return {
        step for step in steps if any(problem.spoils for problem in problems_of_step(folder, step, checksums=checksums))
    }


def delete_checkpoint(folder: RunFolder, step: int) -> list[Path]:
    """Delete a checkpoint; it loses its name first, so that no half of it is ever taken for one.

    Returns:
        What others have put into its folder, which stays.
    """
    left: list[Path] = []
    for path in folder.step_folders(step):
        nameless = path.with_name(path.name + REPLACED_SUFFIX)
        if os.path.lexists(nameless):
            discard(nameless)
        path.rename(nameless)
        left += discard(nameless)
    return left
