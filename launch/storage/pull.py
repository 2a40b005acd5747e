"""Bringing a checkpoint from the store to this machine's disk: each file is hashed on the way, then the folder gets its
name."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data.s3 import S3Prefix
from data.transfer import Watch
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

_PART = ".part"


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

        Raises:
            UserError: what is in the store is not what its manifest says, the name is taken, or there is no access.
            TransferFailed: the store gave up.
            OSError: the disk did.
        """
        from parallel.checkpoint_writer import take_name

        in_the_way = what_is_in_the_way(self.folder)
        if in_the_way:
            raise UserError(in_the_way)
        watch = watch or Watch()
        partial = self.folder.with_name(self.folder.name + PARTIAL_SUFFIX)
        partial.mkdir(parents=True, exist_ok=True)
        here = [entry for entry in self.checkpoint.manifest.files if self._keep(entry, partial)]
        first, count = self.share
        wanted = [
            entry
            for index, entry in enumerate(entries_of(self.checkpoint.manifest))
            if index % count == first and entry not in here
        ]
        objects = S3Prefix(
            self.store.bucket,
            f"{self.store.prefix}/{self.checkpoint.folder.rstrip('/')}",
            endpoint_url=self.store.upload.endpoint_url,
            connections=self.store.upload.workers + 2,
        )
        with ThreadPoolExecutor(self.store.upload.workers, thread_name_prefix="pull") as pool:
            for done in [pool.submit(_bring, objects, entry, partial, watch) for entry in wanted]:
                done.result()
        write_atomic(partial / MANIFEST_FILE, self.checkpoint.text)
        sync(partial)
        take_name(self.folder, partial)
        return sum(entry.size for entry in wanted)

    def _keep(self, entry: FileEntry, partial: Path) -> bool:
        """Whether a file is here already, from an earlier attempt or in the checkpoint that is to be replaced."""
        if compare_file(partial, entry, read=True) is None:
            return True
        (partial / entry.name).unlink(missing_ok=True)
        if compare_file(self.folder, entry, read=True) is not None:
            return False
        os.link(self.folder / entry.name, partial / entry.name)
        return True


def _bring(objects: S3Prefix, entry: FileEntry, folder: Path, watch: Watch) -> None:
    part = folder / f".{entry.name}{_PART}"
    if objects.copy(entry.name, entry.size, part, watch) != entry.sha256:
        part.unlink()
        raise UserError(f"{objects.url(entry.name)}: its content is not what its manifest says (SHA-256 differs)")
    part.replace(folder / entry.name)
