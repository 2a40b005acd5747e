"""Going back after a loss spike, and on without the batches around it (PaLM, arXiv:2204.02311, section 5.1).

Every rank knows the loss, so all of them come here at the same step. The order of what is changed on disk makes a
kill -9 between any two changes harmless:

1. checkpoints newer than the one to go back to lose their names, the newest first;
2. the range is appended to the run's recipe: from here on it counts;
3. what lost its name is deleted.

A launch that was ended before 2 resumes from an older state of the run as it was, meets the same spike (the losses that
a loss is compared with are in the checkpoint) and comes here again; one that was ended after 2 finds the range in the
recipe, and no state that has read it. Nameless checkpoints are removed when a launch begins to save.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.train.engine import TrainingEngine
from launch.train.metrics import Event
from launch.train.resume import Start, load_start
from launch.train.run_folder import RunFolder
from nanotron_recipes.files import sync
from nanotron_recipes.loading import dump_yaml
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.data import SkippedRange
from nanotron_recipes.schema.guards import Guards
from nanotron_recipes.skipped import SkippedBatches, with_ranges
from parallel.checkpoint_disks import Disks
from parallel.checkpoint_files import REPLACED_SUFFIX, remove_own_files
from parallel.checkpoint_search import first_sound_checkpoint, steps_on_all_disks
from parallel.together import FailedTogether, together


@dataclass(frozen=True)
class Rewind:
    """How a run goes on after a spike.

    Attributes:
        to: the step whose state the engine has now.
        recipe: the run's recipe with the range appended.
        recipe_text: the file that holds it.
        state: what `load_checkpoint` returned.
        refused: steps before the spike whose checkpoints are damaged -> what is wrong with them.
    """

    to: int
    recipe: Recipe
    recipe_text: str
    state: dict[str, Any]
    refused: dict[int, str]


def rewind(
    folder: RunFolder, disks: Disks, recipe: Recipe, engine: TrainingEngine, spike: int
) -> tuple[Rewind | None, Event]:
    """Go back to before the spike of step `spike`, where that can be done; a collective of the world.

    No save may be going on.

    Returns:
        What to go on with, and None where the run goes on as it is; the record of it.
    """
    reason = _reason_to_stay(recipe)
    if reason:
        return None, _event(spike, None, None, reason, {})
    choices = in_order_of_choice(steps_on_all_disks(folder.steps()), recipe.guards, spike)
    to, sound, refused = first_sound_checkpoint(folder.checkpoints, choices, disks)
    if sound is None:
        return None, _event(spike, None, None, "there is no checkpoint from before it", refused)
    skipped = range_to_skip(recipe, spike, to)
    new = with_ranges(recipe, [skipped])
    text, reason = _change_folder(folder, disks, new, spike, to, skipped)
    if reason:
        return None, _event(spike, None, None, reason, refused)
    start = Start(sound, folder.checkpoints / str(to), disks, to + 1, True, refused)
    state = load_start(start, engine.built.buckets, engine.optimizer)
    return Rewind(to, new, text, state, refused), _event(spike, to, skipped, None, refused)


def range_to_skip(recipe: Recipe, spike: int, to: int) -> SkippedRange:
    """The batches that are left out after the spike of step `spike`, by a run that goes back to the state of `to`."""
    numbers, guards = SkippedBatches.of(recipe), recipe.guards
    first = numbers.batch_of(max(to + 1, spike - guards.rewind_skip_before))
    return SkippedRange(first=first, end=numbers.batch_of(spike) + guards.rewind_skip_after, spike_step=spike)


def in_order_of_choice(steps: Sequence[int], guards: Guards, spike: int) -> list[int]:
    """Checkpoints to go back to: those that have read nothing of what is to be skipped, then others before the spike,
    each from the newest on."""
    before = sorted((step for step in steps if step < spike), reverse=True)
    border = spike - guards.rewind_skip_before
    return [*(step for step in before if step < border), *(step for step in before if step >= border)]


def _reason_to_stay(recipe: Recipe) -> str:
    rewinds = sum(skipped.spike_step is not None for skipped in recipe.data_skipped_ranges)
    limit = recipe.guards.max_rewinds
    return f"the run went back {rewinds} times (guards.max_rewinds {limit})" if rewinds >= limit else ""


def _change_folder(
    folder: RunFolder, disks: Disks, recipe: Recipe, spike: int, to: int, skipped: SkippedRange
) -> tuple[str, str]:
    """Do what this file's docstring says; the text of the run's recipe, or why nothing was changed."""
    nameless: list[Path] = []
    line = (
        f"after step {to}: batches {skipped.first} to {skipped.end - 1} are skipped, for the loss spike of step {spike}"
    )

    def write() -> str:
        header = folder.header()
        folder.write_recipe(dump_yaml(recipe), replace(header, changes=(*header.changes, line)))
        return folder.recipe_file.read_text()

    try:
        together(lambda: _set_aside(folder, to, nameless) if disks.is_leader else None)
        text = together(lambda: write() if disks.rank == 0 else "")[0]
    except FailedTogether as failure:
        together(lambda: _give_names_back(nameless))
        return "", str(failure)
    for path in nameless:
        with suppress(OSError):  # the next launch removes what is left
            remove_own_files(path)
    return text, ""


def _set_aside(folder: RunFolder, to: int, nameless: list[Path]) -> None:
    for step in reversed(folder.steps()):
        if step > to:
            path = folder.checkpoints / str(step)
            aside = path.with_name(path.name + REPLACED_SUFFIX)
            if os.path.lexists(aside):
                remove_own_files(aside)
            path.rename(aside)
            nameless.append(aside)
    sync(folder.checkpoints)  # no loss of power brings them back beside the new recipe


def _give_names_back(nameless: list[Path]) -> None:
    for path in reversed(nameless):
        path.rename(path.with_name(path.name.removesuffix(REPLACED_SUFFIX)))


def _event(
    spike: int, to: int | None, skipped: SkippedRange | None, reason: str | None, refused: dict[int, str]
) -> Event:
    return {
        "event": "rewind",
        "step": spike,
        "to": to,
        "skipped": None if skipped is None else [skipped.first, skipped.end],
        "reason": reason,
        "refused": {str(step): why for step, why in refused.items()},
    }
