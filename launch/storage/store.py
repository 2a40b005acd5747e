"""The objects of one run in an S3 store: sent in parts, read back, and nothing ever deleted.

    <upload_s3_path>/<run>/owner.json                     which run this is
    <upload_s3_path>/<run>/<step>/<identity>/<file>       a file of a checkpoint
    <upload_s3_path>/<run>/<step>/<identity>/.sent/<node>.json   the files that a node has sent and read back
    <upload_s3_path>/<run>/<step>/<identity>/manifest.json       last: all that it names was read back

The identity is taken from the manifest, so that a step that is trained again, after a rewind, is another checkpoint
beside the first and no object ever changes. Imports boto3 when it is first used.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

from data.s3 import Patience
from data.s3_client import s3_client
from data.text_files import remote_reason
from data.transfer import Watch
from launch.storage.throttle import Throttle
from nanotron_recipes.paths import s3_place
from nanotron_recipes.schema.checkpoints import S3Upload
from parallel.checkpoint_files import FileEntry

T = TypeVar("T")

PART_BYTES = 1 << 25
MOST_PARTS = 10_000
"""Of one object: docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html"""
_CHUNK = 1 << 22
_ABSENT = {"NoSuchKey", "NoSuchUpload", "NotFound", "404"}
_AGAIN = {"InternalError", "RequestTimeout", "RequestLimitExceeded", "ServiceUnavailable", "SlowDown", "Throttling"}
_OF_A_LISTING = {"Name", "Prefix", "MaxKeys", "KeyCount", "IsTruncated"}
"""Of which every listing has some."""
_ANSWERS_SOON = Patience(attempts=4, first_seconds=0.5, longest_seconds=4.0)


class StoreFailed(RuntimeError):
    """The store did not do what it was asked.

    Attributes:
        is_refusal: it answered, and would answer the same again: no access, no such bucket, no credentials.
    """

    def __init__(self, message: str, *, is_refusal: bool) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal


class DamagedFile(RuntimeError):
    """What lies on the disk is not what the manifest says."""


class _Absent(Exception):
    """There is no such object or upload."""


@dataclass(frozen=True)
class Sending:
    """How a store sends: what it is told of, and how fast it may be.

    Attributes:
        watch: `advance` is told the bytes that have arrived, `note` what went wrong; `stop` ends it.
        well: called when a request was answered as it should be.
        throttle: asked before a part is sent.
    """

    watch: Watch
    well: Callable[[], object] = lambda: None
    throttle: Throttle | None = None


class RunStore:
    """The part of a store that one run has. Its methods may be called from several threads.

    Every method raises StoreFailed where `patience` comes to its end, or at once where no other attempt may help and
    patience is not without end; Stopped.
    """

    def __init__(
        self,
        upload: S3Upload,
        run: str,
        *,
        patience: Patience = _ANSWERS_SOON,
        sending: Sending | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        """
        Args:
            upload: where the store is; upload_s3_path must be given.
            run: the run's name.
            patience: how often each request is tried.
            part_bytes: of files that are larger, so much is sent with a request.
        """
        assert upload.upload_s3_path is not None, "only where the recipe uploads"
        place = s3_place(upload.upload_s3_path)
        assert place is not None, "the recipe's checks let nothing else pass"
        self.bucket, self.prefix = place[0], f"{place[1]}/{run}"
        self.upload = upload
        self._patience = patience
        self._sending = sending or Sending(Watch())
        self._part_bytes = part_bytes

    def url(self, name: str = "") -> str:
        """What an object is called."""
        return f"s3://{self.bucket}/{self.prefix}/{name}".rstrip("/")

    @property
    def place(self) -> str:
        """Server and URL."""
        return f"{self.upload.endpoint_url or ''} {self.url()}".strip()

    def stop(self) -> None:
        """Have what goes on in other threads, and whatever is asked later, raise Stopped."""
        self._sending.watch.stop.set()

    def check_bucket(self) -> None:
        """Raise StoreFailed where the bucket is not there for us."""
        self._list("", Prefix=self._key(""), MaxKeys=1)

    def folders(self, name: str = "") -> list[str]:
        """The names of what lies below a folder (`""`, or ending with a slash) in folders of their own."""
        return [
            entry["Prefix"].removesuffix("/").rpartition("/")[2]
            for page in self._pages(name)
            for entry in page.get("CommonPrefixes", [])
        ]

    def names(self, name: str) -> list[str]:
        """The names of the objects directly in a folder (ending with a slash)."""
        return [entry["Key"].rpartition("/")[2] for page in self._pages(name) for entry in page.get("Contents", [])]

    def read(self, name: str) -> bytes | None:
        """A small object, whole; None where there is none."""
        try:
            return self._try(name, lambda: bytes(self._get(name)["Body"].read()))
        except _Absent:
            return None

    def write(self, name: str, body: bytes) -> None:
        """Make, or replace, a small object."""
        request = {"Bucket": self.bucket, "Key": self._key(name), "Body": body}
        self._try(name, lambda: self._client.put_object(**request), may_be_absent=False)

    def holds(self, name: str, entry: FileEntry) -> bool:
        """Whether an object is there with the content that a manifest says; it is read where its size is right."""
        try:
            head = self._try(name, lambda: self._client.head_object(Bucket=self.bucket, Key=self._key(name)))
            return head["ContentLength"] == entry.size and self._try(name, lambda: self._sha256(name)) == entry.sha256
        except _Absent:
            return False

    def send(self, path: Path, name: str, entry: FileEntry) -> None:
        """Send a file unless it is there, and read back what has arrived, until that is what the manifest says.

        Raises:
            DamagedFile: the file itself is not what the manifest says.
            OSError: it cannot be read.
        """
        failures = 0
        while not self.holds(name, entry):
            if failures:
                self._wait(name, "what has arrived is not what was sent (sha256)", failures)
            failures += 1
            with path.open("rb") as file:
                try:
                    if entry.size <= self._part_bytes:
                        self._send_whole(file, path, name, entry)
                    else:
                        self._send_parts(file, path, name, entry)
                except _Absent:
                    continue  # somebody ended the upload of these parts

    def _send_whole(self, file: IO[bytes], path: Path, name: str, entry: FileEntry) -> None:
        body = file.read()
        _require(hashlib.sha256(body).hexdigest(), path, entry)
        self._throttle(len(body))
        self.write(name, body)
        self._sending.watch.advance(len(body))

    def _send_parts(self, file: IO[bytes], path: Path, name: str, entry: FileEntry) -> None:
        where = {"Bucket": self.bucket, "Key": self._key(name)}
        self._end_older_uploads(name)
        upload = self._try(name, lambda: self._client.create_multipart_upload(**where))["UploadId"]
        length = max(self._part_bytes, -(-entry.size // MOST_PARTS))
        parts: list[dict[str, Any]] = []
        digest, sent = hashlib.sha256(), 0
        try:
            while body := file.read(length):
                digest.update(body)
                parts.append(self._send_part({**where, "UploadId": upload}, len(parts) + 1, body, name))
                sent += len(body)
                self._sending.watch.advance(len(body))
            _require(digest.hexdigest(), path, entry)
            whole = {"Parts": parts}
            self._try(
                name,
                lambda: self._client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload=whole),
            )
        except BaseException:
            self._quietly(lambda: self._client.abort_multipart_upload(**where, UploadId=upload))
            self._sending.watch.advance(-sent)
            raise

    def _send_part(self, where: dict[str, str], number: int, body: bytes, name: str) -> dict[str, Any]:
        self._throttle(len(body))
        sent = self._try(name, lambda: self._client.upload_part(**where, PartNumber=number, Body=body))
        return {"PartNumber": number, "ETag": sent["ETag"]}

    def _end_older_uploads(self, name: str) -> None:
        """Of this object: a process that was killed has left its parts, which nobody sees and somebody pays for."""
        key = self._key(name)

        def end() -> None:
            for found in self._client.list_multipart_uploads(Bucket=self.bucket, Prefix=key).get("Uploads", []):
                if found["Key"] == key:
                    self._client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=found["UploadId"])

        self._quietly(end)  # not everybody may list them

    def _pages(self, name: str) -> Iterator[dict[str, Any]]:
        request = {"Prefix": self._key(name), "Delimiter": "/"}
        while True:
            page = self._list(name, **request)
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def _list(self, name: str, **request: Any) -> dict[str, Any]:
        """A page of names."""
        found: dict[str, Any] = self._try(
            name, lambda: self._client.list_objects_v2(Bucket=self.bucket, **request), may_be_absent=False
        )
        if _OF_A_LISTING.isdisjoint(found):  # a page for people, which a network shows to who is not logged in
            raise StoreFailed(f"{self.url(name)}: it answers, but not as an S3 store does", is_refusal=True)
        return found

    def _sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        for chunk in self._get(name)["Body"].iter_chunks(_CHUNK):
            self._sending.watch.check()
            digest.update(chunk)
        return digest.hexdigest()

    def _get(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._client.get_object(Bucket=self.bucket, Key=self._key(name))
        return found

    def _throttle(self, count: int) -> None:
        if self._sending.throttle is not None:
            self._sending.throttle.take(count, self._sending.watch)

    def _try(self, name: str, request: Callable[[], T], *, may_be_absent: bool = True) -> T:
        """What a request returns, tried again as long as patience lasts.

        Raises _Absent too where the request is for an object or an upload; elsewhere it is the bucket that is not
        there, also where the answer was cut before it said so.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        failures = 0
        while True:
            self._sending.watch.check()
            try:
                result = request()
            except (BotoCoreError, ClientError) as error:
                if may_be_absent and _code(error) in _ABSENT:
                    raise _Absent from None
                failures += 1
                self._wait(name, remote_reason(error), failures, is_refusal=_is_refusal(error))
            else:
                self._sending.well()
                return result

    def _wait(self, name: str, reason: str, failures: int, *, is_refusal: bool = False) -> None:
        is_patient = self._patience.attempts >= ENDLESS.attempts
        if failures >= self._patience.attempts or (is_refusal and not is_patient):
            raise StoreFailed(f"{self.url(name)}: {reason}", is_refusal=is_refusal)
        self._sending.watch.note(f"{self.url(name)}: {reason}")
        self._patience.wait(failures, self._sending.watch)

    def _quietly(self, request: Callable[[], object]) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            request()
        except (BotoCoreError, ClientError):
            return

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    @cached_property
    def _client(self) -> Any:
        # One attempt: what went wrong is said and waited out here.
        connections = self.upload.workers + 2
        return s3_client(endpoint_url=self.upload.endpoint_url, connections=connections, attempts=1)


ENDLESS = Patience(attempts=1 << 62)
"""For what is done beside a training: an outage ends, and access can be given."""


def _require(found: str, path: Path, entry: FileEntry) -> None:
    if found != entry.sha256:
        raise DamagedFile(f"{path}: its content is not what was written (SHA-256 differs)")


def _code(error: Exception) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _is_refusal(error: Exception) -> bool:
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return 300 <= status < 500 and status not in (408, 429) and _code(error) not in _AGAIN
    return isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError)
