"""Bringing a checkpoint from the store to this machine's disk: each file is hashed on the way, then the folder gets its
name."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

from data.s3 import S3Prefix
from data.transfer import TransferFailed, Watch
from launch.storage.remote import RemoteCheckpoint, entries_of
from launch.storage.store import RunStore
from nanotron_recipes.errors import UserError
from nanotron_recipes.files import sync, write_atomic
from parallel.checkpoint_files import (
    MANIFEST_FILE,
    PARTIAL_SUFFIX,
    FileEntry,
    compare_file,
    what_is_in_the_way,
)


class ObjectRefused(UserError):
    """An object in the store is not what the checkpoint's manifest says, or cannot be had."""


@dataclass(frozen=True)
class Pull:
    """What one disk takes of a checkpoint.

    Attributes:
        folder: the checkpoint's name on this disk.
        share: (k, n): every n-th file, from the k-th, when n disks share the work.
    """

    store: RunStore
    checkpoint: RemoteCheckpoint
    folder: Path
    share: tuple[int, int] = (0, 1)

    def run(self, watch: Watch | None = None) -> int:
        """Bring this disk's share, and keep what is here and right; the bytes that came from the store.

        The folder has its name when all of that is whole and durable; a damaged checkpoint that had it is replaced.

        What has come before an error is kept for the next attempt.

        Raises:
            ObjectRefused: what is in the store is not what its manifest says, or there is no access.
            UserError: the name is taken, or another process brings it.
            TransferFailed: the store gave up, or there is no room.
            OSError: the disk did.
        """
        in_the_way = what_is_in_the_way(self.folder)
        if in_the_way:
            raise UserError(in_the_way)
        self.partial.mkdir(parents=True, exist_ok=True)
        with _only_one(self.partial):
            try:
                return self._bring(self.partial, replace(watch or Watch(), stop=Event()))
            except BaseException:
                _remove_if_useless(self.partial)
                raise

    @property
    def partial(self) -> Path:
        """Where files are until all are here."""
        return self.folder.with_name(self.folder.name + PARTIAL_SUFFIX)

    def _bring(self, partial: Path, watch: Watch) -> int:
        from parallel.checkpoint_writer import take_name

        here = [entry for entry in self.checkpoint.manifest.files if self._keep(entry, partial)]
        first, count = self.share
        wanted = [
            entry
            for index, entry in enumerate(entries_of(self.checkpoint.manifest))
            if index % count == first and entry not in here
        ]
        self._require_space(partial, wanted)
        self._fetch(wanted, partial, watch)
        write_atomic(partial / MANIFEST_FILE, self.checkpoint.text)
        sync(partial)
        take_name(self.folder, partial)
        return sum(entry.size for entry in wanted)

    def _fetch(self, wanted: Sequence[FileEntry], partial: Path, watch: Watch) -> None:
        """All of them; the first that fails, or an interrupt, ends the others."""
        objects = S3Prefix(
            self.store.bucket,
            f"{self.store.prefix}/{self.checkpoint.folder.rstrip('/')}",
            endpoint_url=self.store.upload.endpoint_url,
            connections=self.store.upload.workers + 2,
        )
        pool = ThreadPoolExecutor(self.store.upload.workers, thread_name_prefix="pull")
        try:
            for done in as_completed([pool.submit(_bring, objects, entry, partial, watch) for entry in wanted]):
                done.result()
        finally:
            watch.stop.set()
            pool.shutdown(cancel_futures=True)

    def _require_space(self, partial: Path, wanted: Sequence[FileEntry]) -> None:
        begun = (partial / _part_of(entry) for entry in wanted)
        needed = sum(entry.size for entry in wanted) - sum(file.stat().st_size for file in begun if file.is_file())
        free = shutil.disk_usage(partial).free
        if needed > free:
            raise TransferFailed(
                f"{partial}: no room: {needed / 1e9:,.3f} GB are to come, {free / 1e9:,.3f} GB are free; delete what "
                "is there, or other files"
            )

    def _keep(self, entry: FileEntry, partial: Path) -> bool:
        """Whether a file is here already, from an earlier attempt or in the checkpoint that is to be replaced."""
        if compare_file(partial, entry, read=True) is None:
            return True
        (partial / entry.name).unlink(missing_ok=True)
        if compare_file(self.folder, entry, read=True) is not None:
            return False
        os.link(self.folder / entry.name, partial / entry.name)
        return True


def _part_of(entry: FileEntry) -> str:
    return f".{entry.name}.part"


def _remove_if_useless(partial: Path) -> None:
    """Remove the folder of a pull that nothing has come of."""
    with suppress(OSError):
        for file in partial.glob(".*.part"):
            if not file.stat(follow_symlinks=False).st_size:
                file.unlink()
        partial.rmdir()


@contextmanager
def _only_one(partial: Path) -> Iterator[None]:
    """Keeps other processes from bringing the same checkpoint to this folder. Raises UserError where one does."""
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{partial}: another process fetches this checkpoint; wait for it") from None
        yield
    finally:
        os.close(descriptor)


def _bring(objects: S3Prefix, entry: FileEntry, folder: Path, watch: Watch) -> None:
    part = folder / _part_of(entry)
    try:
        digest = objects.copy(entry.name, entry.size, part, watch)
    except UserError as error:
        raise ObjectRefused(str(error)) from None
    if digest != entry.sha256:
        part.unlink()
        raise ObjectRefused(f"{objects.url(entry.name)}: its content is not what its manifest says (SHA-256 differs)")
    part.replace(folder / entry.name)
