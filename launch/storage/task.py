"""Bringing one checkpoint, as far as it lies on this node's disk, to the store."""

import json
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launch.storage.remote import entries_of, identity_of
from launch.storage.store import DamagedFile, RunStore
from parallel.checkpoint_files import MANIFEST_FILE, FileEntry, Manifest, read_manifest

_SENT = ".sent"


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on this node's disk.

    Attributes:
        folders: where its files lie: one, or where a person pushes, those of all disks that are seen.
        text: its manifest as it is written.
        version: `version_of` it.
    """

    step: int
    folders: tuple[Path, ...]
    text: bytes
    manifest: Manifest
    version: tuple[int, int]

    @classmethod
    def read(cls, step: int, folders: Sequence[Path]) -> "LocalCheckpoint":
        """Raises OSError, UserError."""
        version, first = cls.version_of(folders), _first(folders)
        return cls(step, tuple(folders), (first / MANIFEST_FILE).read_bytes(), read_manifest(first), version)

    @staticmethod
    def version_of(folders: Sequence[Path]) -> tuple[int, int]:
        """Another one for another manifest. Raises OSError."""
        found = (_first(folders) / MANIFEST_FILE).stat()
        return found.st_ino, found.st_mtime_ns

    @cached_property
    def identity(self) -> str:
        """What it is called in the store."""
        return identity_of(self.text)

    def path(self, entry: FileEntry) -> Path | None:
        """Where a file lies; None where it is on another node."""
        places = (folder / entry.name for folder in self.folders)
        return next((place for place in places if place.is_file() and place.stat().st_size == entry.size), None)


def _first(folders: Sequence[Path]) -> Path:
    return next((folder for folder in folders if (folder / MANIFEST_FILE).is_file()), folders[0])


@dataclass(frozen=True)
class UploadTask:
    """Sends what this node has to send of a checkpoint, and the manifest when all nodes have done so.

    Attributes:
        node: the name of this node; empty: a person pushes what is seen from here.
        nodes: of the launch; a part goes from the first of them that it was written to.
        workers: files at a time.
    """

    store: RunStore
    checkpoint: LocalCheckpoint
    node: str
    nodes: tuple[str, ...]
    workers: int

    def is_whole(self) -> bool:
        """Whether all of it is in the store. Raises what `RunStore` does."""
        return self.store.read(self._name(MANIFEST_FILE)) == self.checkpoint.text

    def parts(self) -> list[FileEntry]:
        """The files that this node is to send first: those that only some nodes have."""
        return [entry for entry in entries_of(self.checkpoint.manifest) if entry.nodes and self._is_mine(entry)]

    def num_bytes(self) -> int:
        """Of what this node sends, as far as that is known."""
        everywhere = [entry for entry in self.checkpoint.manifest.files if not entry.nodes]
        return sum(entry.size for entry in (*self.parts(), *everywhere))

    def send(self) -> bool:
        """Send what is this node's; whether the checkpoint is whole in the store then.

        Raises what `RunStore.send` does.
        """
        if self.is_whole():
            return True
        mine = self.parts()
        self._send_all(mine)
        if mine:
            names = json.dumps([entry.name for entry in mine]).encode()
            sender = self.node or f"pushed-from-{socket.gethostname()}"
            self.store.write(self._name(f"{_SENT}/{sender}.json"), names)
        return self.finish()

    def finish(self) -> bool:
        """Send what lies on every disk, and the manifest, where all parts are in the store; whether they are."""
        if self.is_whole():
            return True
        files = self.checkpoint.manifest.files
        if not {entry.name for entry in files if entry.nodes} <= self._sent():
            return False
        self._send_all([entry for entry in entries_of(self.checkpoint.manifest) if not entry.nodes])
        self.store.write(self._name(MANIFEST_FILE), self.checkpoint.text)
        return self.is_whole()

    def _send_all(self, entries: Sequence[FileEntry]) -> None:
        """All of them. After the first that fails none is begun; an interrupt also ends those that are being sent."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="upload")
        try:
            for done in as_completed([pool.submit(self._send_one(entry)) for entry in entries]):
                done.result()
        except KeyboardInterrupt:
            self.store.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _send_one(self, entry: FileEntry) -> Callable[[], None]:
        def send() -> None:
            path = self.checkpoint.path(entry)
            if path is None:
                place = self.checkpoint.folders[0] / entry.name
                raise DamagedFile(f"{place}: expected a file of {entry.size:,} bytes, as its manifest says")
            self.store.send(path, self._name(entry.name), entry)

        return send

    def _is_mine(self, entry: FileEntry) -> bool:
        first = next((node for node in entry.nodes if node in self.nodes), None)
        return first == self.node if self.node and first is not None else self.checkpoint.path(entry) is not None

    def _sent(self) -> set[str]:
        sent: set[str] = set()
        folder = self._name(f"{_SENT}/")
        for name in self.store.names(folder) if any(e.nodes for e in self.checkpoint.manifest.files) else ():
            try:
                sent.update(map(str, json.loads(self.store.read(folder + name) or b"[]")))
            except (ValueError, TypeError):
                continue
        return sent

    def _name(self, file: str) -> str:
        return f"{self.checkpoint.step}/{self.checkpoint.identity}/{file}"
