"""Megatron-core's `.bin` and `.idx` as shards: the same tokens, with an index of document ends and a manifest.

`.idx`, little-endian: the magic, uint64 version 1, uint8 code of the token type, uint64 number n of sequences, uint64
number m of document bounds; int32 lengths [n] in tokens, int64 places [n] in bytes of `.bin`, int64 document bounds [m]
in sequences, from 0 to n. `.bin` holds the tokens, sequence after sequence.
"""

import hashlib
import os
import shutil
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from data.manifest import Inputs, Manifest, ShardFile, Split, write_manifest
from data.tokenizer import TokenizerInfo
from nanotron_recipes.errors import UserError
from nanotron_recipes.files import sync

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_CHUNK_TOKENS = 1 << 22
_SHARD = "00000.ds"

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MegatronIndex:
    """What an `.idx` file says."""

    dtype: np.dtype[np.generic]
    """Of the tokens in `.bin`."""
    document_ends: Int64Array
    """Where each document ends, in tokens; equal neighbours are documents without tokens."""

    @property
    def tokens(self) -> int:
        """In all documents."""
        return int(self.document_ends[-1]) if len(self.document_ends) else 0


def read_megatron_index(path: Path) -> MegatronIndex:
    """Reads and checks an `.idx` file. UserError where it is none, is cut off, or is not of consecutive sequences."""
    content = _mapped(path)
    if len(content) < _HEADER.size or bytes(content[: len(_MAGIC)]) != _MAGIC:
        raise UserError(f"{path}: no index of Megatron-core (it does not begin with MMIDIDX)")
    _, version, code, sequences, bounds = _HEADER.unpack(bytes(content[: _HEADER.size]))
    if version != 1:
        raise UserError(f"{path}: version {version}: expected version 1")
    if code not in _DTYPES or _DTYPES[code].startswith("float"):
        raise UserError(f"{path}: token type {code} ({_DTYPES.get(code, 'unknown')}): expected a type of whole numbers")
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    if len(content) == expected + sequences and sequences:
        raise UserError(f"{path}: a multimodal index: expected one of text alone")
    if len(content) != expected:
        raise UserError(
            f"{path}: {len(content)} bytes: expected {expected} for {sequences} sequences and {bounds} document bounds"
        )
    lengths, rest = content[_HEADER.size :].view("<i4")[:sequences], content[_HEADER.size + 4 * sequences :].view("<i8")
    dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    ends = np.zeros(sequences + 1, dtype=np.int64)
    np.cumsum(lengths, out=ends[1:])
    if (lengths < 0).any() or not np.array_equal(rest[:sequences], ends[:-1] * dtype.itemsize):
        raise UserError(f"{path}: expected sequences that lie one after the other in the .bin file")
    documents = rest[sequences:]
    if not bounds or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise UserError(f"{path}: expected document bounds that rise from 0 to the {sequences} sequences")
    return MegatronIndex(dtype, ends[documents[1:]])


def _mapped(path: Path) -> npt.NDArray[np.uint8]:
    try:
        if not path.stat().st_size:
            raise UserError(f"{path}: empty")
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def import_megatron(
    prefix: Path, out: Path, tokenizer: TokenizerInfo, read: Callable[[int], object] = lambda count: None
) -> Manifest:
    """Writes `<prefix>.bin` and `<prefix>.idx`, made with `tokenizer`, as the folder `out` of one shard.

    The folder gets its name when everything is in it. `read` is told the bytes as they are read. Raises UserError where
    the files do not fit each other or the tokenizer, and where `out` is taken.
    """
    bin_path, index_path = (prefix.with_name(f"{prefix.name}.{ending}") for ending in ("bin", "idx"))
    index = read_megatron_index(index_path)
    if not bin_path.is_file():
        raise UserError(f"{bin_path}: no such file")
    size, expected = bin_path.stat().st_size, index.tokens * index.dtype.itemsize
    if size != expected:
        raise UserError(
            f"{bin_path}: {size} bytes: expected {expected} for the {index.tokens} {index.dtype} of its .idx"
        )
    if not index.tokens:
        raise UserError(f"{bin_path}: holds no tokens")
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: expected a new folder; something is there already")
    unfinished = out.absolute().with_name(f".{out.absolute().name}.importing-{uuid.uuid4().hex[:12]}")
    unfinished.mkdir(parents=True)
    try:
        manifest = _write(bin_path, index_path, index, unfinished, out.name, tokenizer, read)
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync(out.absolute().parent)
    return manifest


def _write(
    bin_path: Path,
    index_path: Path,
    index: MegatronIndex,
    folder: Path,
    source: str,
    tokenizer: TokenizerInfo,
    read: Callable[[int], object],
) -> Manifest:
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.token_bytes == 2 else "uint32"
    sha256 = _convert(bin_path, index.dtype, folder / _SHARD, np.dtype(dtype).newbyteorder("<"), tokenizer, read)
    ends = np.unique(index.document_ends[index.document_ends > 0]).astype("<u8").tobytes()
    _write_synced(folder / f"{_SHARD}.index", ends)
    index_content = hashlib.sha256(index_path.read_bytes()).hexdigest()
    empty = len(index.document_ends) - len(ends) // 8
    shard = ShardFile(
        name=_SHARD,
        size=index.tokens * tokenizer.token_bytes,
        sha256=sha256,
        index_sha256=hashlib.sha256(ends).hexdigest(),
        tokens=index.tokens,
        documents=len(ends) // 8,
    )
    manifest = Manifest(
        source=source,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        tokenizer_sha256=tokenizer.sha256,
        settings_sha256=hashlib.sha256(f"import-megatron {sha256} {index_content}".encode()).hexdigest(),
        inputs=Inputs(files=2, bytes=bin_path.stat().st_size + index_path.stat().st_size, sha256=index_content),
        made_by="import-megatron",
        train=Split(files=(shard,)),
        validation=Split(),
        rejected={"empty document": empty} if empty else {},
    )
    write_manifest(folder, manifest)
    return manifest


def _convert(
    path: Path,
    dtype: np.dtype[np.generic],
    out: Path,
    out_dtype: np.dtype[np.generic],
    tokenizer: TokenizerInfo,
    read: Callable[[int], object],
) -> str:
    """Writes the tokens as `out_dtype`; their sha256. UserError where one cannot be the tokenizer's."""
    digest = hashlib.sha256()
    with path.open("rb") as file, out.open("xb") as written:
        place = 0
        while len(tokens := np.fromfile(file, dtype=dtype, count=_CHUNK_TOKENS)):
            wrong = np.flatnonzero((tokens < 0) | (tokens >= tokenizer.vocab_size))
            if len(wrong):
                raise UserError(
                    f"{path}: token {place + int(wrong[0])} is {int(tokens[wrong[0]])}: expected 0 to "
                    f"{tokenizer.vocab_size - 1}, the vocabulary of {tokenizer.folder}"
                )
            content = tokens.astype(out_dtype).tobytes()
            digest.update(content)
            written.write(content)
            place += len(tokens)
            read(tokens.nbytes)
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def share_ending_in_eos(folder: Path, manifest: Manifest) -> float:
    """Part of the documents of an imported shard whose last token is the tokenizer's end-of-document token."""
    ends = np.fromfile(folder / f"{_SHARD}.index", dtype="<u8").astype(np.int64)
    tokens = np.memmap(folder / _SHARD, dtype=np.dtype(manifest.dtype).newbyteorder("<"), mode="r")
    return float(np.mean(tokens[ends - 1] == manifest.eos_token_id))
