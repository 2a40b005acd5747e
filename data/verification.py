"""Every byte of shards against their manifests."""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from data.manifest import Manifest
from data.shards import INDEX_ENTRY_BYTES

_CHUNK = 1 << 22


@dataclass(frozen=True)
class ExpectedFile:
    """A file as a manifest describes it."""

    name: str
    """Relative to the source's folder."""
    path: Path
    size: int
    sha256: str


def expected_files(folder: Path, manifest: Manifest, train: Collection[int] | None = None) -> list[ExpectedFile]:
    """The files of a source, tokens and indices, training and held-out parts; of the training files those with the
    numbers in `train` where it is given."""
    kept = [file for number, file in enumerate(manifest.train.files) if train is None or number in train]
    files = []
    for shard in (*kept, *manifest.validation.files):
        index = f"{shard.name}.index"
        files.append(ExpectedFile(shard.name, folder / shard.name, shard.size, shard.sha256))
        files.append(ExpectedFile(index, folder / index, shard.documents * INDEX_ENTRY_BYTES, shard.index_sha256))
    return files


def file_problem(file: ExpectedFile, read: Callable[[int], object] = lambda count: None) -> str | None:
    """What is wrong with a file, None where it is as it was written; `read` is told the bytes as they are hashed."""
    digest = hashlib.sha256()
    try:
        found = file.path.stat().st_size
        if found != file.size:
            return f"{found} bytes, and its manifest says {file.size}"
        with file.path.open("rb", buffering=0) as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
                read(len(chunk))
    except OSError as error:
        return error.strerror or str(error)
    return None if digest.hexdigest() == file.sha256 else "its content is not what its manifest says (sha256)"
