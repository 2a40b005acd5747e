"""The manifest of a tokenized source: what its shards hold, and a fingerprint of it that a run can be tied to."""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from nanotron_recipes.errors import UserError
from nanotron_recipes.files import write_atomic

MANIFEST_NAME = "manifest.json"
STAGED_NAME = "_staged.jsonl"
"""Beside it where the shards are copies (`data.staged`)."""

_MOST = 1 << 48
"""No number in a manifest is larger: a shard of so many tokens does not exist, and sums of these are still int64."""
Positive = Annotated[int, Field(ge=1, le=_MOST)]
NotNegative = Annotated[int, Field(ge=0, le=_MOST)]


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not path.name or "\0" in name or path.is_absolute() or ".." in path.parts or str(path) != name:
        raise PydanticCustomError("inside", "expected a file inside the source's folder")
    return name


class ShardFile(BaseModel):
    """One `.ds` file of tokens with its `.ds.index` of document ends."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(_inside)]
    """Path of the `.ds` file relative to the source's folder; the index is beside it as `<name>.index`."""
    size: Positive
    """Size of the `.ds` file in bytes."""
    sha256: str
    """Of the `.ds` file, hexadecimal."""
    index_sha256: str
    """Of the `.ds.index` file, hexadecimal."""
    tokens: Positive
    """Tokens in the file, end-of-document tokens included."""
    documents: Positive
    """Documents in the file, each with at least one token."""


class Split(BaseModel):
    """The training or the validation part of a source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: tuple[ShardFile, ...] = ()
    """In reading order: the split is their concatenation."""
    text_bytes: NotNegative = 0
    """UTF-8 bytes of the text that the tokens stand for (0 = unknown, for shards made elsewhere)."""

    @property
    def tokens(self) -> int:
        """Tokens of all files."""
        return sum(file.tokens for file in self.files)

    @property
    def documents(self) -> int:
        """Documents of all files."""
        return sum(file.documents for file in self.files)

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes a token, end-of-document tokens counted: nats/token / ln 2 / this = bits per byte."""
        return self.text_bytes / self.tokens if self.text_bytes and self.tokens else None


class Inputs(BaseModel):
    """The files that a source's text was read from, as they were then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: NotNegative
    """How many."""
    bytes: NotNegative
    """Of all of them together."""
    sha256: str
    """Over their names, sizes and times of change (of remote files ETags, hashes of the hub), hexadecimal."""
    path: str | None = None
    """Where they lay, as the recipe says it, for s3:// and hf://; null for files of a machine."""
    revision: str | None = None
    """Of a data set of the hub: the commit, tag or branch, as the recipe says it."""

    def __str__(self) -> str:
        return f"{self.files:,} {'file' if self.files == 1 else 'files'} of {self.bytes:,} bytes"


class Manifest(BaseModel):
    """Everything that is known about a tokenized source; `manifest.json` in its folder, written last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    """Of this file and of the shards' layout."""
    source: str
    """Name of the source in the recipe that tokenized it."""
    dtype: Literal["uint16", "uint32"]
    """Little-endian type of a token in the `.ds` files."""
    vocab_size: Positive
    """Entries of the tokenizer, special tokens included; every token is smaller."""
    eos_token_id: NotNegative
    """The token at the end of every document."""
    tokenizer_sha256: str
    """Of the tokenizer's `tokenizer.json`, hexadecimal."""
    settings_sha256: str
    """Of the recipe's settings that made these shards: `tokenize` does nothing while they are the same."""
    inputs: Inputs | None = None
    """What the text was read from; null for text that comes with Python, and for shards made elsewhere."""
    made_by: Literal["tokenize", "import-megatron"] | None = None
    """The command that wrote the shards; null where the manifest does not say."""
    train: Split
    validation: Split
    rejected: dict[str, int] = {}
    """Lines or documents that were not used, by reason."""

    @model_validator(mode="after")
    def _check_files(self) -> "Manifest":
        if self.eos_token_id >= self.vocab_size:
            raise PydanticCustomError("eos", "eos_token_id: expected less than the vocab_size")
        names = {MANIFEST_NAME}
        for file in (*self.train.files, *self.validation.files):
            pair = {file.name, f"{file.name}.index"}
            if names & pair:
                raise PydanticCustomError("twice", "{name}: expected files of different names", {"name": file.name})
            names |= pair
            if file.size != file.tokens * self.token_bytes or file.documents > file.tokens:
                raise PydanticCustomError(
                    "sizes",
                    "{name}: {size} bytes cannot be {tokens} tokens of {dtype} in {documents} documents",
                    file.model_dump() | {"dtype": self.dtype},
                )
        return self

    @property
    def token_bytes(self) -> int:
        """Bytes a token takes in the `.ds` files."""
        return 2 if self.dtype == "uint16" else 4

    @property
    def fingerprint(self) -> str:
        """sha256 over what the shards hold, hexadecimal; not over where they lie or what they are called."""
        content = self.model_dump(include={"format_version", "dtype", "eos_token_id", "tokenizer_sha256"})
        for name, split in (("train", self.train), ("validation", self.validation)):
            content[name] = [
                [file.size, file.tokens, file.documents, file.sha256, file.index_sha256] for file in split.files
            ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the source in `folder`; UserError where it is missing, unreadable or of another version: with
    what makes it again, as far as the files beside it tell."""
    path = folder / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {folder} holds no tokenized source") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return parse_manifest(text, str(path))
    except UserError as error:
        raise UserError(f"{error}; {_way_out(folder)}") from None


def _way_out(folder: Path) -> str:
    if (folder / STAGED_NAME).is_file():
        return "run `nanotron-recipes data stage RECIPE` on this machine, which writes it again"
    if any(folder.rglob("*.ds.metadata")):  # which `tokenize` leaves beside every shard
        return f"move the folder {folder} away and run `nanotron-recipes tokenize RECIPE`, which makes its shards again"
    return "bring it again from where it was made"


def parse_manifest(text: bytes, path: str) -> Manifest:
    """The manifest that was read from `path`; UserError where it is none, or of another version."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path}: {where}: {first['msg']}") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`; to be called after every file that it names is in place."""
    write_atomic(folder / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")
