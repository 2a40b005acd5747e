"""Where the files of a source lie: a folder of this machine, objects of S3, or a data set of the Hugging Face hub."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from data.manifest import Inputs
from nanotron_recipes.errors import UserError, shorten, show_value, user_error
from nanotron_recipes.schema.data import CorpusSource
from nanotron_recipes.urls import HUB_PREFIX, is_url

if TYPE_CHECKING:
    from datatrove.io import DataFolder

GLOBS = {
    "jsonl": ("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst"),
    "parquet": ("**/*.parquet",),
    "text": ("**/*.txt", "**/*.md"),
}
"""What each reader of files understands; files and folders whose name begins with a dot are left out."""
_LONGEST_REASON = 200


@dataclass(frozen=True)
class TextFile:
    """A file as it was found."""

    name: str
    """Relative to its folder."""
    size: int
    """Bytes, packed as it is."""
    version: int | str
    """What changes with its content: the time of change in nanoseconds, an ETag, the hub's hash."""


@dataclass(frozen=True)
class TextFiles:
    """The files that a source reads, in their order."""

    folder: str
    """A path or a URL; of a data set with its revision."""
    files: list[TextFile]


class TextIsGone(UserError):
    """Nothing of a source's text is there, or can be reached."""


def files_of(source: CorpusSource) -> TextFiles:
    """The files of a jsonl, parquet or text source.

    Raises TextIsGone where its path does not exist, cannot be reached, or holds no file for the reader; another
    UserError where the recipe does not say what to read, or only some of the files can be looked at.
    """
    where = f"corpus.sources {source.name}"
    if source.path is None:
        raise UserError(f"{where}: path: expected a file or a folder for the reader {source.reader}")
    globs = GLOBS[source.reader] if source.glob is None else (source.glob,)
    for glob in globs:
        _check_glob(glob, where)
    if is_url(source.path):
        shown = source.path if source.revision is None else f"{source.path} ({source.revision})"
        with _named_errors(f"{where}: path: {shown}"):
            text = _remote_files(_with_revision(source.path, source.revision), globs, source.glob is not None)
    else:
        text = _local_files(Path(source.path), globs, source.glob is not None, where)
    if not text.files:
        raise TextIsGone(f"{where}: path: {source.path}: no file matches {' or '.join(globs)}")
    return text


def inputs_of(source: CorpusSource) -> Inputs | None:
    """The files that a source reads, told by name, size and version; null where it reads none.

    Raises UserError as `files_of` does.
    """
    if source.reader not in GLOBS:
        return None
    files = files_of(source).files
    digest = hashlib.sha256(json.dumps([[file.name, file.size, file.version] for file in files]).encode())
    return Inputs(
        files=len(files),
        bytes=sum(file.size for file in files),
        sha256=digest.hexdigest(),
        path=source.path if source.path and is_url(source.path) else None,
        revision=source.revision,
    )


def _check_glob(glob: str, where: str) -> None:
    try:
        if ".." in Path(glob).parts:
            raise ValueError("it leaves the folder")
        if any("**" in part and part != "**" for part in Path(glob).parts):  # Python 3.13 takes it for one *
            raise ValueError("** stands for whole folders alone")
        next(Path("/nowhere").glob(glob), None)
    except (ValueError, NotImplementedError) as error:
        expected = f"expected a pattern such as **/*.jsonl, relative to path ({error})"
        raise user_error(expected, key=f"{where}: glob", value=glob) from None


def _local_files(path: Path, globs: tuple[str, ...], with_hidden: bool, where: str) -> TextFiles:
    kind: type[UserError] = TextIsGone
    try:
        if path.is_file():
            return TextFiles(str(path.parent), [_local_file(path.parent, path.name)])
        if path.exists() and not path.is_dir():
            raise UserError(f"{where}: {path}: expected a file or a folder, found {_kind(path)}")
        if not path.is_dir():
            raise TextIsGone(f"{where}: path: {path}: no such file or folder")
        kind = UserError  # from here on something is there, and what cannot be seen of it may have changed
        every = {file for glob in globs for file in path.glob(glob)}
        matches = sorted(file for file in every if with_hidden or not _is_hidden(file.relative_to(path).as_posix()))
        found = sorted(file.relative_to(path).as_posix() for file in matches if file.is_file())
        broken = next((file for file in matches if not file.exists()), None)
        if broken is not None:
            kind = kind if found else TextIsGone
            raise kind(f"{where}: {broken}: a link to a file that is not there")
        other = next((file for file in matches if not (file.is_file() or file.is_dir())), None)
        if other is not None:
            raise UserError(f"{where}: {other}: expected a file, found {_kind(other)}")
        odd = next((name for name in found if not _is_unicode(name)), None)
        if odd is not None:
            raise UserError(f"{where}: {path / odd}: expected names of files in UTF-8")
        return TextFiles(str(path), [_local_file(path, name) for name in found])
    except OSError as error:
        raise kind(f"{where}: path: {show_value(str(path))}: cannot be looked through: {error.strerror}") from None


def _is_hidden(name: str) -> bool:
    """Whether a name, or that of a folder in it, is one that editors, notebooks and file systems give to their own."""
    return any(part.startswith(".") for part in name.split("/"))


def _kind(path: Path) -> str:
    """What something is that is there and is neither a file nor a folder; it is not opened, which may never end."""
    if path.is_fifo():
        return "a FIFO"
    return "a socket" if path.is_socket() else "a device"


def _is_unicode(name: str) -> bool:
    """Whether a name can be written down: what is no UTF-8 on the disk is a half of a surrogate pair in Python."""
    return not any("\ud800" <= sign <= "\udfff" for sign in name)


def _local_file(folder: Path, name: str) -> TextFile:
    facts = (folder / name).stat()
    return TextFile(name, facts.st_size, facts.st_mtime_ns)


def _with_revision(path: str, revision: str | None) -> str:
    """`hf://datasets/owner/name/folder` with the revision where fsspec expects it."""
    if revision is None:
        return path.rstrip("/")
    owner, name, *folders = path.removeprefix(HUB_PREFIX).strip("/").split("/")
    return "/".join([f"{HUB_PREFIX}{owner}/{name}@{quote(revision, safe='')}", *folders])


def _remote_files(url: str, globs: tuple[str, ...], with_hidden: bool) -> TextFiles:
    folder = open_folder(url)
    if folder.isfile(""):
        parent, _, name = url.rpartition("/")
        return TextFiles(parent, [_remote_file(name, folder.info(""))])
    found: dict[str, Any] = {}
    for glob in globs:
        found |= folder.glob(glob, detail=True)
    files = [
        _remote_file(name, facts)
        for name, facts in sorted(found.items())
        if facts["type"] == "file" and (with_hidden or not _is_hidden(name))
    ]
    return TextFiles(url, files)


def _remote_file(name: str, facts: dict[str, Any]) -> TextFile:
    return TextFile(name, facts["size"], facts.get("ETag") or facts["blob_id"])


def open_folder(path: str) -> "DataFolder":
    """A folder of this machine, of S3 or of the hub as datatrove reads it."""
    from datatrove.io import DataFolder

    if path.startswith("s3://"):
        from data.s3_files import S3Files

        return DataFolder(path, fs=S3Files())
    return DataFolder(path)


@contextmanager
def _named_errors(where: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise TextIsGone(f"{where}: no such file or folder, or not for you") from None
    except Exception as error:  # each of the libraries below has families of its own
        raise TextIsGone(f"{where}: cannot be looked through: {remote_reason(error)}") from None


def remote_reason(error: Exception) -> str:
    """What a library says of a storage that cannot be reached, in one short line."""
    response = getattr(error, "response", None)
    answer = response if isinstance(response, dict) else {}
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status and not answer.get("Error", {}).get("Code"):
        return f"HTTP status {status}; expected the answer of an S3 store"
    if 300 <= status < 400:
        return f"HTTP status {status}, a redirect; expected the server and region where the bucket is"
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return shorten(text, _LONGEST_REASON)
