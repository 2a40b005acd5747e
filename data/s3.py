"""Files below a prefix of an S3 store, of whatever maker, read through boto3. Imports boto3 when it is first used."""

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.s3_client import s3_client
from data.text_files import remote_reason
from data.transfer import CHUNK, PartialFile, Stopped, TransferFailed, Watch
from nanotron_recipes.errors import UserError

_AGAIN = {"InternalError", "RequestTimeout", "RequestLimitExceeded", "ServiceUnavailable", "SlowDown", "Throttling"}


@dataclass(frozen=True)
class Patience:
    """How long a store that fails is asked again: after first_seconds, twice that … up to longest_seconds."""

    attempts: int = 8
    """Attempts in a row that bring nothing before it is given up."""
    first_seconds: float = 1.0
    longest_seconds: float = 30.0

    def wait(self, failures: int, watch: Watch) -> None:
        """Waits after so many failures in a row, up to half as long by chance. Raises Stopped."""
        seconds = min(self.longest_seconds, self.first_seconds * 2 ** min(failures - 1, 30))
        if watch.stop.wait(seconds * random.uniform(0.5, 1)):
            raise Stopped


class S3Prefix:
    """s3://bucket/prefix. Its methods may be called from several threads."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        *,
        endpoint_url: str | None = None,
        connections: int = 16,
        patience: Patience = Patience(),  # immutable
    ) -> None:
        """`endpoint_url` and credentials are those of AWS's own configuration where they are not given."""
        self._bucket, self._prefix = bucket, prefix
        self._endpoint_url, self._connections = endpoint_url, connections
        self.patience = patience

    def url(self, name: str) -> str:
        """What a file is called."""
        return f"s3://{self._bucket}/{self._prefix}/{name}"

    def read(self, name: str, watch: Watch) -> bytes | None:
        """A small object, whole; None where there is none. Raises UserError, TransferFailed, Stopped."""
        failures = 0
        while True:
            try:
                return bytes(self._get(name, 0)["Body"].read())
            except Exception as error:
                if self._code(error) in ("NoSuchKey", "NoSuchBucket", "404"):
                    return None
                failures += 1
                self._go_on(name, error, failures, watch)

    def copy(self, name: str, size: int, to: Path, watch: Watch) -> str:
        """Copies an object that should have `size` bytes to `to`, going on with what is there; returns its sha256.

        A connection that ends in the middle, a server that fails or asks to slow down: the rest is asked for again.
        Raises UserError, TransferFailed, Stopped; OSError where the file cannot be written.
        """
        with PartialFile(to, size, watch) as part:
            failures = 0
            while part.length < size:
                before = part.length
                try:
                    response = self._get(name, part.length)
                    if part.length and response["ResponseMetadata"]["HTTPStatusCode"] != 206:
                        part.restart()  # this store always sends everything
                    self._check_size(name, size, int(response["ContentLength"]) + part.length)
                    for chunk in response["Body"].iter_chunks(CHUNK):
                        part.write(chunk)
                except Exception as error:
                    failures = 1 if part.length > before else failures + 1
                    self._go_on(name, error, failures, watch)
            return part.finish()

    def _get(self, name: str, first: int) -> dict[str, Any]:
        wanted = {"Range": f"bytes={first}-"} if first else {}
        found: dict[str, Any] = self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}/{name}", **wanted)
        return found

    def _check_size(self, name: str, size: int, found: int) -> None:
        if found != size:
            raise UserError(f"{self.url(name)}: {found} bytes, and its manifest says {size}")

    def _go_on(self, name: str, error: Exception, failures: int, watch: Watch) -> None:
        """Waits where another attempt may help. Raises UserError or TransferFailed where none does, Stopped."""
        from botocore import exceptions

        if not isinstance(error, (exceptions.ClientError, exceptions.BotoCoreError)):
            raise error
        reason = remote_reason(error)
        lost = exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError
        may_help = isinstance(error, lost)
        if isinstance(error, exceptions.ClientError):
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            may_help = self._code(error) in _AGAIN or status >= 500 or status == 429
        if not may_help:
            raise UserError(f"{self.url(name)}: {reason}") from None
        if failures >= self.patience.attempts:
            raise TransferFailed(f"{self.url(name)}: given up after {failures} attempts: {reason}") from None
        watch.note(f"{self.url(name)}: {reason}; trying again")
        self.patience.wait(failures, watch)

    @staticmethod
    def _code(error: Exception) -> str:
        response = getattr(error, "response", None)
        return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""

    @cached_property
    def _client(self) -> Any:
        # One attempt: what went wrong is said and waited out here.
        return s3_client(endpoint_url=self._endpoint_url, connections=self._connections, attempts=1)
