"""Where staged files come from: a folder that this machine sees, or a prefix in an S3 store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from data.s3 import S3Prefix
from data.s5cmd import S5cmdPrefix, find_s5cmd
from data.transfer import CHUNK, PartialFile, TransferFailed, Watch
from nanotron_recipes.errors import UserError
from nanotron_recipes.paths import s3_place
from nanotron_recipes.schema.data import DataStaging


class Origin(Protocol):
    """Files by their names below one place."""

    def read(self, name: str, watch: Watch) -> bytes | None:
        """A small file; None where there is none. Raises UserError, TransferFailed."""
        ...

    def copy(self, name: str, size: int, to: Path, watch: Watch) -> str:
        """Copies a file that should have `size` bytes to `to`, going on with what is there; returns its sha256.

        Raises UserError or TransferFailed where it cannot be had, OSError where it cannot be written, Stopped.
        """
        ...


class FolderOrigin:
    """A folder of this machine, such as one of a shared file system."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, name: str, watch: Watch) -> bytes | None:
        """See Origin."""
        try:
            return (self._path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{self._path / name}: cannot be read: {error.strerror}") from None

    def copy(self, name: str, size: int, to: Path, watch: Watch) -> str:
        """See Origin."""
        with PartialFile(to, size, watch) as part:
            for chunk in _chunks(self._path / name, part.length, size):
                part.write(chunk)
            return part.finish()


def _chunks(path: Path, first: int, size: int) -> Iterator[bytes]:
    """The content of a file from a place on; what cannot be read is not taken for what cannot be written."""
    try:
        with path.open("rb", buffering=0) as file:
            found = path.stat().st_size
            if found != size:
                raise UserError(f"{path}: {found} bytes, and its manifest says {size}")
            file.seek(first)
            while chunk := file.read(CHUNK):
                yield chunk
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, but the manifest beside it names it") from None
    except OSError as error:
        raise TransferFailed(f"{path}: cannot be read: {error.strerror}") from None


def open_origin(place: str, staging: DataStaging) -> Origin:
    """The origin that `place`, a folder or s3://bucket/prefix, is; nothing is looked at yet."""
    on_s3 = s3_place(place)
    if on_s3 is None:
        return FolderOrigin(Path(place))
    prefix = S3Prefix(*on_s3, endpoint_url=staging.endpoint_url, connections=staging.workers)
    s5cmd = find_s5cmd(staging.s5cmd_path)
    return prefix if s5cmd is None else S5cmdPrefix(prefix, s5cmd, staging.endpoint_url, staging.s5cmd_concurrency)
