"""A tokenized corpus on S3: every file is read back and hashed before the manifest that names it is written.

    <upload_to>/tokenizer/                         the tokenizer's files
    <upload_to>/<source>/*.ds[.index]              each with its sha256 in the object's metadata
    <upload_to>/<source>/manifest.json             written last: a source without it is not there yet

Called again it goes on: what is there is not sent again, but it is read back like all else, because the sha256 in its
metadata came with it and says nothing about what has arrived. Where all manifests are there, they alone are read.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.manifest import MANIFEST_NAME, Manifest
from data.s3_client import s3_client
from data.text_files import remote_reason
from data.verification import expected_files
from nanotron_recipes.errors import UserError
from nanotron_recipes.paths import s3_place
from nanotron_recipes.schema.data import Corpus

_SHA256 = "nanotron-recipes-sha256"
"""Metadata of the objects that are ours to replace."""
_THREADS = 8
_CHUNK = 1 << 22


@dataclass(frozen=True)
class _Upload:
    client: Any
    bucket: str
    prefix: str

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def url(self, name: str) -> str:
        return f"s3://{self.bucket}/{self.key(name)}"

    def sha256_of(self, name: str) -> str | None:
        """What an object's metadata says; "" where it says nothing, None where there is no object."""
        from botocore.exceptions import ClientError

        try:
            head = self.client.head_object(Bucket=self.bucket, Key=self.key(name))
        except ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                return None
            raise
        found: str = head["Metadata"].get(_SHA256, "")
        return found

    def holds(self, name: str, sha256: str) -> bool:
        """Whether the object is there with this content; it is read where its metadata says so."""
        return self.sha256_of(name) == sha256 == self._content_sha256(name)

    def send(self, path: Path, name: str, sha256: str) -> None:
        """Sends a file unless it is there, and hashes what has arrived."""
        if self.holds(name, sha256):
            return
        if self.sha256_of(name) == "":
            raise UserError(f"{self.url(name)}: expected a free place; `tokenize` did not make this object")
        self.client.upload_file(str(path), self.bucket, self.key(name), ExtraArgs={"Metadata": {_SHA256: sha256}})
        if self._content_sha256(name) != sha256:
            self.client.delete_object(Bucket=self.bucket, Key=self.key(name))
            if _sha256_of(path) != sha256:
                raise UserError(
                    f"{path}: its content is not what its manifest says (sha256); "
                    "`nanotron-recipes data verify RECIPE` says what brings it back"
                )
            raise UserError(f"{self.url(name)}: what has arrived is not what was sent (sha256); tokenize again")

    def _content_sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        body = self.client.get_object(Bucket=self.bucket, Key=self.key(name))["Body"]
        for chunk in body.iter_chunks(_CHUNK):
            digest.update(chunk)
        return digest.hexdigest()


def upload_corpus(
    corpus: Corpus, manifests: list[Manifest], tokenizer: Path, say: Callable[[str], object] = lambda line: None
) -> None:
    """Brings the shards of all sources, and their tokenizer, to `corpus.upload_to`; `say` is told what was sent.

    Raises UserError where S3 cannot be reached or written to, where something else is in the place, where what arrived
    is not what was sent, and where a file that was sent is not what its manifest says.
    """
    assert corpus.upload_to is not None, "only where the recipe says so"
    place = s3_place(corpus.upload_to)
    assert place is not None, "the recipe's checks let nothing else pass"
    with _named_errors(corpus.upload_to):
        upload = _Upload(s3_client(connections=_THREADS), *place)
        lacking = [manifest for manifest in manifests if not _is_there(upload, Path(corpus.path), manifest)]
        for file in ("tokenizer_config.json", "tokenizer.json") if lacking else ():
            _send_whole(upload, tokenizer / file, f"tokenizer/{file}")
        for manifest in lacking:
            _send_source(upload, Path(corpus.path, manifest.source), manifest)
            say(f"{upload.url(manifest.source)}: {manifest.source} is there, read back and hashed")


def _is_there(upload: _Upload, corpus: Path, manifest: Manifest) -> bool:
    """Whether a source's manifest is there, which is written when all that it names has been read back."""
    name = f"{manifest.source}/{MANIFEST_NAME}"
    return upload.holds(name, _sha256_of(corpus / name))


def _send_source(upload: _Upload, folder: Path, manifest: Manifest) -> None:
    whole = f"{manifest.source}/{MANIFEST_NAME}"
    if upload.sha256_of(whole):
        # An older one: without it nobody takes old and new shards for a source.
        upload.client.delete_object(Bucket=upload.bucket, Key=upload.key(whole))
    files = expected_files(folder, manifest)
    with ThreadPoolExecutor(_THREADS) as pool:
        sending = [
            pool.submit(upload.send, file.path, f"{manifest.source}/{file.path.relative_to(folder)}", file.sha256)
            for file in files
        ]
        for sent in sending:
            sent.result()
    _send_whole(upload, folder / MANIFEST_NAME, whole)


def _send_whole(upload: _Upload, path: Path, name: str) -> None:
    upload.send(path, name, _sha256_of(path))


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _named_errors(url: str) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise UserError(f"corpus.upload_to: {url}: {remote_reason(error)}") from None
