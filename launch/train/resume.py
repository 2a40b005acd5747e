"""Where a launch goes on: the newest checkpoint whose every byte is as it was written, or another run's.

Imports no torch at module level: what is said before a launch is said at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.train.run_folder import RunFolder
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe
from parallel.checkpoint_files import MANIFEST_FILE, Manifest, Problem, read_manifest, verify_checkpoint_files


@dataclass(frozen=True)
class Start:
    """Where training begins.

    Attributes:
        checkpoint: the folder to read; None draws new weights.
        first_step: the first step to train.
        load_optimizer: whether AdamW's moments and counter are read as well.
        refused: steps of this run whose checkpoints are damaged -> what is wrong with them.
        is_branch: whether the checkpoint is another run's.
    """

    checkpoint: Path | None
    first_step: int
    load_optimizer: bool
    refused: dict[int, str]
    is_branch: bool = False

    def lines(self) -> list[str]:
        """What a person should know about it."""
        said = [f"checkpoint of step {step} refused: {reason}" for step, reason in self.refused.items()]
        return [*said, *([f"weights from {self.checkpoint}"] if self.is_branch else [])]


def newest_sound_step(folder: RunFolder, *, checksums: bool = False) -> int:
    """The step of the newest checkpoint that verifies (without `checksums`: by its manifest and sizes), 0 without any.

    Raises:
        UserError: there are checkpoints and none of them is sound.
    """
    steps, reason = folder.steps(), ""
    for step in reversed(steps):
        path = folder.checkpoints / str(step)
        reason = _reason(verify_checkpoint_files(path, checksums=checksums, step=step))
        if not reason:
            return step
    if steps:
        raise UserError(_none_is_sound(folder, steps[0], reason))
    return 0


def find_start(folder: RunFolder, recipe: Recipe, data: str) -> Start:
    """Where this launch goes on; every rank calls this, each reads its share of the files, and all agree.

    Raises:
        UserError: no checkpoint can be used, or it is of a run on other data than those with the fingerprint `data`.
    """
    refused: dict[int, str] = {}
    for step in reversed(folder.steps()):
        path = folder.checkpoints / str(step)
        reason = _agree_on(path, step)
        if not reason:
            require_data(path, data)
            return Start(path, step + 1, True, refused)
        refused[step] = reason
    if refused:
        oldest, reason = list(refused.items())[-1]
        raise UserError(_none_is_sound(folder, oldest, reason))
    wanted = recipe.checkpoints
    if wanted.resume_checkpoint_path is None:
        return Start(None, 1, True, refused)
    parent = Path(wanted.resume_checkpoint_path)
    reason = _agree_on(parent)
    if reason:
        raise UserError(f"checkpoints.resume_checkpoint_path: {parent}: {reason}")
    step = read_manifest(parent).step if wanted.load_lr_scheduler else 0
    return Start(parent, step + 1, wanted.load_optimizer, refused, is_branch=True)


def require_data(checkpoint: Path, data: str) -> None:
    """Raise UserError where a run's checkpoint was not trained on the data with this fingerprint."""
    found = read_manifest(checkpoint).data
    if found != data:
        raise UserError(
            f"{checkpoint}: it was trained on other data: fingerprint {found[:12] or 'none'}, not {data[:12]}"
        )


def first_sound(folder: RunFolder, steps: Iterable[int], refused: dict[int, str]) -> int | None:
    """The first of `steps` whose checkpoint is sound; the others are added to `refused` with the reason. Every rank
    calls this with the same steps, and all agree."""
    for step in steps:
        reason = _agree_on(folder.checkpoints / str(step), step)
        if not reason:
            return step
        refused[step] = reason
    return None


def parent_manifest(recipe: Recipe) -> Manifest | None:
    """What the checkpoint that the recipe starts from says of itself; None where it starts from nothing.

    Raises:
        UserError: the key names no complete checkpoint.
    """
    path = recipe.checkpoints.resume_checkpoint_path
    if path is None:
        return None
    if not (Path(path) / MANIFEST_FILE).is_file():
        raise UserError(
            f"checkpoints.resume_checkpoint_path: {path}: expected the folder of a step, <run>/checkpoints/<step>"
        )
    return read_manifest(Path(path))


def _agree_on(path: Path, step: int | None = None) -> str:
    """Why a checkpoint is refused, the same on all ranks; empty for a sound one. `step`: of a run's own, its name."""
    import torch.distributed as torch_dist

    count = torch_dist.get_world_size()
    found = _reason(verify_checkpoint_files(path, share=(torch_dist.get_rank(), count), step=step))
    reasons = [found] * count
    torch_dist.all_gather_object(reasons, found)
    return next((reason for reason in reasons if reason), "")


def _reason(problems: list[Problem]) -> str:
    spoiling = [problem for problem in problems if problem.spoils]
    more = f" (and {len(spoiling) - 1} more)" if len(spoiling) > 1 else ""
    return f"{spoiling[0]}{more}" if spoiling else ""


def _none_is_sound(folder: RunFolder, step: int, reason: str) -> str:
    return (
        f"{folder.checkpoints}: no checkpoint can be used (step {step}: {reason}); "
        "move them away to begin again, or start another run with --run"
    )
