"""s5cmd, where it is installed, in place of boto3 for moving whole objects."""

import contextlib
import errno
import os
import shutil
import subprocess
from pathlib import Path

from data.s3 import S3Prefix
from data.transfer import PartialFile, TransferFailed, Watch
from nanotron_recipes.errors import UserError

_LOOK_SECONDS = 0.5
_LONGEST_REASON = 300
_HOPELESS = (
    "AccessDenied",
    "Forbidden",
    "NoSuchBucket",
    "NoSuchKey",
    "NotFound",
    "InvalidAccessKeyId",
    "SignatureDoes",
)


def find_s5cmd(path: str | None) -> Path | None:
    """The s5cmd of the recipe, else the one on PATH, else None. UserError where the recipe's is none."""
    found = shutil.which(path or "s5cmd")
    if path is not None and found is None:
        raise UserError(f"data_staging.s5cmd_path: {path}: no such program")
    return Path(found) if found is not None else None


class S5cmdPrefix:
    """A prefix whose files s5cmd moves; what is small is read through boto3."""

    def __init__(self, prefix: S3Prefix, program: Path, endpoint_url: str | None, concurrency: int) -> None:
        self._prefix = prefix
        endpoint = [] if endpoint_url is None else ["--endpoint-url", endpoint_url]
        self._command = [str(program), *endpoint, "--log", "error", "cp", "--raw", "--concurrency", str(concurrency)]

    def read(self, name: str, watch: Watch) -> bytes | None:
        """As S3Prefix.read."""
        return self._prefix.read(name, watch)

    def copy(self, name: str, size: int, to: Path, watch: Watch) -> str:
        """As S3Prefix.copy, but what an earlier attempt left is thrown away; hashed when all of it is there."""
        failures = 0
        while reason := self._move(name, to, watch):
            failures += 1
            if any(word in reason for word in _HOPELESS):
                raise UserError(f"{self._prefix.url(name)}: {reason}")
            if failures >= self._prefix.patience.attempts:
                raise TransferFailed(f"{self._prefix.url(name)}: given up after {failures} attempts: {reason}")
            watch.note(f"{self._prefix.url(name)}: {reason}; trying again")
            self._prefix.patience.wait(failures, watch)
        found = to.stat().st_size
        if found != size:
            to.unlink()
            raise UserError(f"{self._prefix.url(name)}: {found} bytes, and its manifest says {size}")
        with PartialFile(to, size, Watch(stop=watch.stop)) as part:
            return part.finish()

    def _move(self, name: str, to: Path, watch: Watch) -> str:
        """One attempt; why it failed, empty where it did not. OSError where the disk is full, Stopped."""
        # s5cmd writes under a name that it makes up.
        folder = to.with_name(f"{to.name}.s5cmd")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            reason = self._run([*self._command, self._prefix.url(name), str(folder / "object")], folder, watch)
            if not reason:
                (folder / "object").replace(to)
            return reason
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def _run(command: list[str], folder: Path, watch: Watch) -> str:
        told = 0
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while True:
                try:
                    said = process.communicate(timeout=_LOOK_SECONDS)[1]
                    break
                except subprocess.TimeoutExpired:
                    now = _bytes_in(folder)
                    watch.advance(now - told)
                    told = now
                    if watch.stop.is_set():
                        process.kill()
        watch.check()
        if process.returncode == 0:
            watch.advance(_bytes_in(folder) - told)
            return ""
        watch.advance(-told)
        reason = " ".join(said.split())[-_LONGEST_REASON:] or f"s5cmd ended with {process.returncode}"
        if os.strerror(errno.ENOSPC).lower() in reason.lower():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return reason


def _bytes_in(folder: Path) -> int:
    """Of the files in it, what is on disk: parts are written out of order."""
    total = 0
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found = file.stat()
            total += min(found.st_size, found.st_blocks * 512)
    return total
