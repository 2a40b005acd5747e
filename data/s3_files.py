"""Objects of S3 as files that datatrove's readers open: listed, and read in ranges, through boto3.

The endpoint and the credentials are boto3's own (`data.s3_client`). Imports botocore and fsspec: import this module
where an object is read, not before.
"""

import io
import time
from collections.abc import Iterator
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from data.s3_client import s3_client

_RANGE_BYTES = 1 << 24
"""Read at once; the next range is asked for when this one is used up."""
_ATTEMPTS = 5
_WAIT_SECONDS = 0.5
_NOT_FOUND = ("404", "NoSuchKey", "NotFound")


def bucket_and_key(path: str) -> tuple[str, str]:
    """The two parts of `s3://bucket/key`; the key has no slash at its ends and may be empty."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    return bucket, key.strip("/")


class S3Files(AbstractFileSystem):
    """What datatrove's readers need of a file system, read-only."""

    protocol = "s3"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.client = s3_client()

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kwargs: Any
    ) -> Any:
        """All objects below `path`, at any depth: their names, or with `detail` a dictionary by name."""
        bucket, key = bucket_and_key(path)
        found = {entry["name"]: entry for entry in self._list(bucket, f"{key}/" if key else "")}
        return found if detail else list(found)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        """The objects and folders directly in `path`, with `detail` as dictionaries."""
        bucket, key = bucket_and_key(path)
        found = list(self._list(bucket, f"{key}/" if key else "", Delimiter="/"))
        return found if detail else [entry["name"] for entry in found]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name, size, type and ETag of an object; a folder is what objects lie below. Raises FileNotFoundError."""
        bucket, key = bucket_and_key(path)
        if key:
            try:
                head = self.client.head_object(Bucket=bucket, Key=key)
                return _entry(bucket, key, head["ContentLength"], head["ETag"])
            except ClientError as error:
                if error.response["Error"]["Code"] not in _NOT_FOUND:
                    raise
        if next(self._list(bucket, f"{key}/" if key else "", MaxKeys=1), None) is None:
            raise FileNotFoundError(f"s3://{bucket}/{key}")
        return {"name": f"{bucket}/{key}".rstrip("/"), "size": 0, "type": "directory"}

    def _list(self, bucket: str, prefix: str, **options: Any) -> Iterator[dict[str, Any]]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, **options)
        for page in pages:
            for folder in page.get("CommonPrefixes", ()):
                yield {"name": f"{bucket}/{folder['Prefix'].rstrip('/')}", "size": 0, "type": "directory"}
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):
                    yield _entry(bucket, item["Key"], item["Size"], item["ETag"])

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> "_S3File":
        if mode != "rb":
            raise io.UnsupportedOperation(f"s3://{path}: opened with mode {mode!r}: objects are only read here")
        return _S3File(self, path, mode, block_size=_RANGE_BYTES)


def _entry(bucket: str, key: str, size: int, etag: str) -> dict[str, Any]:
    return {"name": f"{bucket}/{key}", "size": size, "type": "file", "ETag": etag}


class _S3File(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        bucket, key = bucket_and_key(self.path)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                wanted = {"Range": f"bytes={start}-{end - 1}", "IfMatch": self.details["ETag"]}
                content: bytes = self.fs.client.get_object(Bucket=bucket, Key=key, **wanted)["Body"].read()
                if len(content) == end - start:
                    return content
                error: Exception = OSError(f"only {len(content)} of {end - start} bytes arrived")
            except BotoCoreError as failed:  # cut off in the middle, which boto3 itself does not mend
                error = failed
            if attempt < _ATTEMPTS:
                time.sleep(_WAIT_SECONDS * 2**attempt)
        raise OSError(f"s3://{bucket}/{key}: {error}")
