"""A folder that appears whole or not at all, whoever else writes the same one at the same time."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanotron_recipes.errors import UserError
from nanotron_recipes.files import sync

_SUFFIX = "partial"
_NAMED = 3

OwnFiles = Callable[[Path], set[str]]
"""The names of what this program wrote into a folder; it may be replaced while it holds nothing else."""


@contextmanager
def whole_folder(out: Path, *, own_files: OwnFiles | None = None) -> Iterator[Path]:
    """Yield a folder beside `out` to fill; when the block ends it is made durable and takes the name `out`.

    An `out` that is not empty is replaced in one step where `own_files` knows everything in it, otherwise refused
    (UserError, naming what is foreign). Nothing at `out` changes when the block raises or the process dies; the OSError
    of a full disk names `out`. Of several that write one `out` at the same time each puts a whole folder there, and the
    last one's stays. What killed ones left beside it is removed.
    """
    out = Path(os.path.abspath(out))
    check_replaceable(out, own_files)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    with _full_disk_named(out), _locked_folder(out) as beside:
        yield beside
        for path in sorted(beside.rglob("*")):
            sync(path)
        sync(beside)
        _take_name(beside, out, own_files)
        sync(out.parent)


def check_replaceable(out: Path, own_files: OwnFiles | None = None) -> None:
    """Raise UserError where `whole_folder` would refuse `out` for what is there, or for where it is to be made."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out}: is not a folder; expected a new or empty one")
    _refuse_foreign(out, out, own_files)
    above = next(path for path in Path(os.path.abspath(out)).parents if os.path.lexists(path))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be made: {above} is not a folder that can be written to")


@contextmanager
def _full_disk_named(out: Path) -> Iterator[None]:
    """What a failed write raises has no name of a file, or one that nobody knows."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(error.errno, error.strerror, str(out)) from error


@contextmanager
def _locked_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, locked while this process lives; removed at the end, whatever then has its name."""
    unique = secrets.token_hex(8)
    beside = out.with_name(f".{out.name}.{os.getpid()}-{unique}.{_SUFFIX}")
    unlocked = beside.with_suffix(".new")  # nobody takes it for a leftover before it is locked
    unlocked.mkdir()
    descriptor = os.open(unlocked, os.O_RDONLY)
    try:
        _lock(descriptor)
        unlocked.rename(beside)
        yield beside
    finally:
        os.close(descriptor)
        shutil.rmtree(unlocked, ignore_errors=True)
        shutil.rmtree(beside, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Remove folders called as `_locked_folder` calls them whose lock nobody holds: their processes are gone."""
    name = re.compile(rf"\.{re.escape(out.name)}\.\d+-[0-9a-f]{{16}}\.{_SUFFIX}")
    for path in out.parent.iterdir():
        if not name.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if _lock(descriptor):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take a lock that the kernel drops with the process; False where another holds it, or there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _take_name(new: Path, out: Path, own_files: OwnFiles | None) -> None:
    try:
        new.rename(out)  # nothing is there, or an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return
    _refuse_foreign(out, out, own_files)
    _exchange(new, out)
    try:
        _refuse_foreign(new, out, own_files)  # what came in between the look and the exchange
    except UserError:
        _exchange(new, out)
        raise


def _refuse_foreign(folder: Path, out: Path, own_files: OwnFiles | None) -> None:
    """Raise UserError, about `out`, where `folder` holds what is not ours to replace."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    if not found:
        return
    own = own_files(folder) if own_files else set()
    foreign = sorted(path.name for path in found if path.name not in own or (path.is_dir() and not path.is_symlink()))
    if not own:
        raise UserError(f"{out}: is not empty and was not written by this command; expected a new or empty folder")
    if foreign:
        names = ", ".join(foreign[:_NAMED]) + (f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else "")
        raise UserError(
            f"{out}: holds {names}, which this command did not write; move that away, or choose a new folder"
        )


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders: in one step where the system can (Linux renameat2), else with three renames."""
    at_fdcwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(old), rename_exchange) == 0:
        return
    aside = new.with_suffix(".aside")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
