"""The files of a checkpoint: a manifest that says what they must be, and how they are compared with it.

`manifest.json` is written last, before the folder takes its name. It holds the size and the SHA-256 of every other file
and a checksum of itself, so that one flipped bit anywhere is found. Nothing here needs torch, and nothing is executed.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from nanotron_recipes.errors import UserError
from nanotron_recipes.files import write_atomic

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
METADATA_FILE = ".metadata"
FORMAT = 1
"""Version of the layout of a checkpoint's folder."""

PARTIAL_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced"

STEP_NAME = re.compile("0|[1-9][0-9]*")
"""What a checkpoint of a run is called: its step."""


def is_checkpoint(path: Path) -> bool:
    """Whether a path is called like a step and was written as a checkpoint, damaged or not."""
    return bool(STEP_NAME.fullmatch(path.name)) and _holds_checkpoint(path)


def _holds_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in (MANIFEST_FILE, STATE_FILE))


_OWN_FILE = re.compile(
    r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|manifest\.json|state\.json|recipe\.yaml"
    r"|\..+\.incoming|\..+\.part|\..+\.[0-9a-f]{32}\.tmp"
)
"""What saves and transfers call their files, while they are written and afterwards; a manifest may list more."""


@dataclass(frozen=True)
class FileEntry:
    """What a file of a checkpoint must be.

    Attributes:
        size: in bytes.
        sha256: hexadecimal.
        nodes: where nodes have disks of their own, those that it was written to; empty: it lies on every disk.
    """

    name: str
    size: int
    sha256: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        step: the step whose result this is.
        data: fingerprint of the data, empty where there was none (an import).
        world: the topology that wrote it, for people: it does not matter for reading.
        files: every file of the folder but the manifest.
    """

    step: int
    data: str
    world: Mapping[str, int]
    files: tuple[FileEntry, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.size for entry in self.files)

    def entry(self, name: str) -> FileEntry | None:
        """The entry of one file."""
        return next((entry for entry in self.files if entry.name == name), None)


ABSENT = ("missing", "elsewhere")
"""Kinds of problems with a file that is not there."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file of a checkpoint; `elsewhere`: it may lie on another node's disk."""

    file: str
    kind: Literal["manifest", "missing", "elsewhere", "size", "checksum", "extra"]
    detail: str

    @property
    def spoils(self) -> bool:
        """Whether the checkpoint cannot be used; a file too many does no harm."""
        return self.kind != "extra"

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`; after this the folder is complete."""
    write_atomic(folder / MANIFEST_FILE, _render(manifest))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{folder}: expected a checkpoint (a folder with {MANIFEST_FILE})") from error
    try:
        manifest = _parse(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged: expected the manifest of a checkpoint, format {FORMAT}") from error
    if _render(manifest).encode() != text:
        raise UserError(f"{path}: damaged: it does not match its own checksum")
    return manifest


def verify_checkpoint_files(
    folder: Path, *, checksums: bool = True, share: tuple[int, int] = (0, 1), step: int | None = None
) -> list[Problem]:
    """Compare a checkpoint's files with its manifest; no problem means that every byte is as it was written.

    Args:
        checksums: read all files; without, only the manifest itself and the sizes of the others are looked at.
        share: (k, n): read only every n-th file's content, from the k-th, when n ranks share the work.
        step: what the folder is called, where it is one of a run's checkpoints: the state must be of that step.
    """
    return verify_checkpoint_parts([folder], checksums=checksums, share=share, step=step)


def verify_checkpoint_parts(
    folders: Sequence[Path], *, checksums: bool = True, share: tuple[int, int] = (0, 1), step: int | None = None
) -> list[Problem]:
    """`verify_checkpoint_files` of a checkpoint whose files lie in several folders, one for each node's disk.

    A file is good that is good in one of them. Of folders that hold different checkpoints the first decides.
    """
    manifest, problem = _first_manifest(folders)
    if manifest is None:
        return [problem]
    problems: list[Problem] = []
    if step is not None and manifest.step != step:
        problems.append(Problem(MANIFEST_FILE, "manifest", f"the state after step {manifest.step}, called {step}"))
    first, count = share
    for index, entry in enumerate(sorted(manifest.files, key=lambda entry: (-entry.size, entry.name))):
        found = [compare_file(folder, entry, read=checksums and index % count == first) for folder in folders]
        if None not in found:
            # A damaged copy says more than that there is none elsewhere.
            problems.append(next((one for one in found if one and one.kind not in ABSENT), found[0]))  # type: ignore[arg-type]
    listed = {MANIFEST_FILE, *(entry.name for entry in manifest.files)}
    names = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}
    return [*problems, *(Problem(name, "extra", "not in the manifest") for name in sorted(names - listed))]


def _first_manifest(folders: Sequence[Path]) -> tuple[Manifest | None, Problem]:
    problem = Problem(MANIFEST_FILE, "manifest", "there is none")
    for folder in folders:
        try:
            return read_manifest(folder), problem
        except UserError as error:
            where, _, detail = str(error).partition(": ")
            problem = Problem(MANIFEST_FILE, "manifest", detail or where)
    return None, problem


def compare_file(folder: Path, entry: FileEntry, *, read: bool) -> Problem | None:
    """What is wrong with one file: that it is no file, its size and, with `read`, its content."""
    path = folder / entry.name
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return Problem(entry.name, "missing", "is no file")
        if found.st_size != entry.size:
            return Problem(entry.name, "size", f"{found.st_size:,} bytes instead of {entry.size:,}")
        if read and describe_file(path).sha256 != entry.sha256:
            return Problem(entry.name, "checksum", "its content is not what was written (SHA-256 differs)")
    except FileNotFoundError as error:
        if entry.nodes:
            return Problem(entry.name, "elsewhere", f"is not here: it was written to node {' and '.join(entry.nodes)}")
        return Problem(entry.name, "missing", f"cannot be read ({error.strerror})")
    except OSError as error:
        return Problem(entry.name, "missing", f"cannot be read ({error.strerror})")
    return None


def describe_file(path: Path) -> FileEntry:
    """Size and checksum of a file as it can be read now. Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileEntry(path.name, file.tell(), digest.hexdigest())


def describe_files(paths: Iterable[Path]) -> tuple[FileEntry, ...]:
    """`describe_file` of several, by name."""
    return tuple(describe_file(path) for path in sorted(paths))


def what_is_in_the_way(folder: Path) -> str:
    """Why a checkpoint may not take a name: what has it is neither a checkpoint nor an empty folder. Else empty."""
    if not os.path.lexists(folder) or _holds_checkpoint(folder):
        return ""
    if folder.is_dir() and not folder.is_symlink():
        what = "a folder of somebody's, not a checkpoint" if any(folder.iterdir()) else ""
    else:
        what = "a file of somebody's, not a checkpoint"
    return f"{folder}: {what}; move it away" if what else ""


def remove_own_files(folder: Path, also: Iterable[str] = ()) -> list[str]:
    """Remove what was written as part of a checkpoint, and then the folder if it is empty; of a link only the link.

    Args:
        also: names of files that no manifest lists yet.

    Returns:
        The names of what is left there: others have put it there.

    Raises:
        OSError: something could not be removed.
    """
    if folder.is_symlink():
        folder.unlink()
        return []
    own = {*also, *_listed_names(folder)}
    found = sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST_FILE)  # it says what is ours: the last
    left = []
    for path in found:
        if (path.name in own or _OWN_FILE.fullmatch(path.name)) and (path.is_symlink() or not path.is_dir()):
            path.unlink()
        else:
            left.append(path.name)
    if not left:
        folder.rmdir()
    return sorted(left)


def discard(nameless: Path) -> list[Path]:
    """Remove a checkpoint that lost its name to REPLACED_SUFFIX; what others have put into it goes to where it was.

    Returns:
        The paths of that. Raises OSError.
    """
    left, place = remove_own_files(nameless), nameless.with_name(nameless.name.removesuffix(REPLACED_SUFFIX))
    if not left:
        return []
    if not os.path.lexists(place):
        nameless.rename(place)
    else:
        for name in left:
            if not os.path.lexists(place / name):
                (nameless / name).rename(place / name)
        with suppress(OSError):  # it has something whose name is taken
            nameless.rmdir()
    return [place / name for name in left]


def _listed_names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in read_manifest(folder).files}
    except UserError:
        return set()


def _render(manifest: Manifest) -> str:
    content = {"format": FORMAT, **asdict(manifest)}
    for entry in content["files"]:
        if not entry["nodes"]:
            del entry["nodes"]
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "checksum": checksum}, indent=2) + "\n"


def _parse(content: Mapping[str, Any]) -> Manifest:
    if content["format"] != FORMAT:
        raise ValueError("another format")
    files = tuple(FileEntry(**{**entry, "nodes": tuple(entry.get("nodes", ()))}) for entry in content["files"])
    if len({entry.name for entry in files}) < len(files):
        raise ValueError("a file twice")
    for entry in files:
        if set("/\0") & set(entry.name) or entry.name in ("", ".", "..") or not is_count(entry.size):
            raise ValueError("not a file of this folder")
    if not is_count(content["step"]) or not isinstance(content["data"], str):
        raise ValueError("not a step of a run")
    return Manifest(content["step"], content["data"], dict(content["world"]), files)


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value of a JSON file is a whole number from 0 on that fits into 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
