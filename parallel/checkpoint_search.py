"""Is every part of a checkpoint good on some disk of this launch? All ranks look together, and all agree."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanotron_recipes.errors import UserError
from parallel.checkpoint_disks import Disks
from parallel.checkpoint_files import ABSENT, MANIFEST_FILE, Manifest, Problem, read_manifest, verify_checkpoint_files
from parallel.together import Group, gather


@dataclass(frozen=True)
class SoundCheckpoint:
    """A checkpoint of which every file is good on some disk.

    Attributes:
        holders: for each file, the disks with a good copy.
    """

    manifest: Manifest
    holders: dict[str, tuple[int, ...]]

    def holds_manifest(self, disk: int) -> bool:
        """Whether a disk has this checkpoint's own manifest, and so the folder."""
        return disk in self.holders[MANIFEST_FILE]


@dataclass(frozen=True)
class _Look:
    """What one rank found on its disk: the identity of the manifest (empty: none is good) and what is wrong."""

    identity: str
    manifest: Manifest | None
    problems: tuple[Problem, ...]


def search_checkpoint(
    folder: Path, disks: Disks, group: Group = None, step: int | None = None
) -> tuple[SoundCheckpoint | None, str]:
    """Look at the checkpoint in `folder` (of this rank's disk) and tell the others; every rank calls this.

    Each rank reads its share of the files on its disk.

    Args:
        step: what the folder is called, where it is one of a run's checkpoints: the state must be of that step.

    Returns:
        The checkpoint, the same on all ranks, or None and why it cannot be used.
    """
    looks = gather(_look(folder, disks, step), group)
    identities = [identity for identity in dict.fromkeys(look.identity for look in looks) if identity]
    reasons = []
    for identity in identities:
        manifest = next(look.manifest for look in looks if look.identity == identity and look.manifest is not None)
        holders = _holders(manifest, identity, looks, disks)
        lost = [name for name, on in holders.items() if not on]
        if not lost:
            return SoundCheckpoint(manifest, holders), ""
        reasons.append(_reason(lost, looks, disks))
    if not identities:
        reasons = [str(problem) for look in looks for problem in look.problems[:1]]
    return None, reasons[0]


def steps_on_all_disks(steps: Iterable[int], group: Group = None) -> list[int]:
    """The steps that any disk has, ascending; every rank calls this with those that lie on its own."""
    return sorted({step for found in gather(list(steps), group) for step in found})


def first_sound_checkpoint(
    folder: Path, steps: Iterable[int], disks: Disks, group: Group = None
) -> tuple[int, SoundCheckpoint | None, dict[int, str]]:
    """The first of `steps`, the same on all ranks, that `search_checkpoint` accepts; every rank calls this.

    Args:
        folder: where the folders of steps lie on this rank's disk.

    Returns:
        The step and what was found of it (0 and None without one), and why each one before it was refused.
    """
    refused: dict[int, str] = {}
    for step in steps:
        sound, reason = search_checkpoint(folder / str(step), disks, group, step)
        if sound is not None:
            return step, sound, refused
        refused[step] = reason
    return 0, None, refused


def _look(folder: Path, disks: Disks, step: int | None) -> _Look:
    found = verify_checkpoint_files(folder, share=disks.share, step=step)
    problems = tuple(problem for problem in found if problem.spoils)
    try:
        manifest = read_manifest(folder)
    except UserError:
        return _Look("", None, problems)
    identity = hashlib.sha256(repr(asdict(manifest)).encode()).hexdigest()
    # One rank of a disk tells the others what the manifest says.
    return _Look(identity, manifest if disks.is_leader else None, problems)


def _holders(manifest: Manifest, identity: str, looks: Sequence[_Look], disks: Disks) -> dict[str, tuple[int, ...]]:
    have = {disk for disk, rank in enumerate(disks.leaders) if looks[rank].identity == identity}
    bad = {(disks.of_rank[rank], problem.file) for rank, look in enumerate(looks) for problem in look.problems}
    names = [MANIFEST_FILE, *(entry.name for entry in manifest.files)]
    return {name: tuple(disk for disk in sorted(have) if (disk, name) not in bad) for name in names}


def _reason(lost: Sequence[str], looks: Sequence[_Look], disks: Disks) -> str:
    """Why a checkpoint is refused: the first of its lost files, damage before absence."""
    found = [
        (problem, disks.of_rank[rank])
        for rank, look in enumerate(looks)
        for problem in look.problems
        if problem.file in lost
    ]
    problem, disk = min(found, key=lambda pair: (pair[0].kind in ABSENT, lost.index(pair[0].file)))
    where = f" on node {disks.names[disk]}" if len(disks.names) > 1 and problem.kind not in ABSENT else ""
    more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
    return f"{problem}{where}{more}"
