"""Sources as large as a published run reads them, on sparse files: what is read is there, the rest are holes."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.coverage import coverage
from data.manifest import Manifest, ShardFile, Split, write_manifest
from data.plan import DataPlan
from data.samples import PlannedBatch
from data.shards import INDEX_ENTRY_BYTES, ShardReader
from data.sources import Source
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import block_length

Int64Array = npt.NDArray[np.int64]

DOCUMENT_TOKENS = 1000
"""Length of every document but the last of a file."""
LARGEST_FILE = 8 * 10**12
"""Bytes; ext4 takes no files above 16 TiB."""
TOKEN_BYTES = 4
_PAGE_ENTRIES = 4096 // INDEX_ENTRY_BYTES


def sparse_manifest(recipe: Recipe, name: str, tokens: int) -> Manifest:
    """A manifest of `tokens` training tokens in files of at most `LARGEST_FILE` bytes, and no held-out text."""
    files: list[ShardFile] = []
    while tokens:
        part = min(tokens, LARGEST_FILE // TOKEN_BYTES)
        files.append(
            ShardFile(
                name=f"{len(files):05d}.ds",
                size=part * TOKEN_BYTES,
                sha256="0" * 64,
                index_sha256=f"{len(files):064x}",
                tokens=part,
                documents=math.ceil(part / DOCUMENT_TOKENS),
            )
        )
        tokens -= part
    return Manifest(
        source=name,
        dtype="uint32",
        vocab_size=recipe.model.architecture.vocab_size,
        eos_token_id=0,
        tokenizer_sha256="0" * 64,
        settings_sha256="0" * 64,
        train=Split(files=tuple(files)),
        validation=Split(),
    )


def tokens_read(recipe: Recipe) -> dict[str, int]:
    """By source, the tokens that the run reads of it, and the one that is only a target."""
    read: dict[str, int] = {}
    for line in coverage(recipe, {}):
        read[line.source] = read.get(line.source, 0) + line.tokens
    return {name: tokens + 1 for name, tokens in read.items()}


def make_sources(recipe: Recipe, step: int) -> tuple[int, PlannedBatch]:
    """Make the folders of all sources of a recipe so that step `step` can be planned and read. Entries of the indices
    are written where looking up that step's documents comes past.

    Returns the bytes that the files seem to have, and the step as arithmetic plans it, without any file."""
    manifests = {name: sparse_manifest(recipe, name, tokens) for name, tokens in tokens_read(recipe).items()}
    recorders = {name: _Recorder(manifest) for name, manifest in manifests.items()}
    block, seed = block_length(recipe), recipe.data_stages[0].data.seed
    plan = DataPlan(
        recipe,
        {
            name: Source(name, Path(name), manifest, recorders[name], recorders[name], seed, block)
            for name, manifest in manifests.items()
        },
    )
    planned = plan.planned(step)
    assert planned.num_valid_targets, "looks every document up"
    apparent = 0
    for name, manifest in manifests.items():
        folder = Path(name)
        folder.mkdir(parents=True)
        for number, file in enumerate(manifest.train.files):
            _make_hole(folder / file.name, file.size)
            _make_index(folder / f"{file.name}.index", file, recorders[name].asked_of_file(number))
            apparent += file.size + file.documents * INDEX_ENTRY_BYTES
        write_manifest(folder, manifest)
    return apparent, planned


class _Recorder(ShardReader):
    """Stands for the shards of a source: knows by arithmetic where documents begin, and remembers what it was asked."""

    def __init__(self, manifest: Manifest) -> None:
        self._files = manifest.train.files
        self._first_tokens = np.cumsum([0, *(file.tokens for file in self._files)]).tolist()
        self.num_tokens = manifest.train.tokens
        self._asked: list[Int64Array] = []

    def documents_before(self, positions: Int64Array) -> Int64Array:
        self._asked.append(positions)
        found, documents = np.zeros_like(positions), 0
        for first, file in zip(self._first_tokens[:-1], self._files, strict=True):
            inside = (positions > first) & (positions <= first + file.tokens)
            found[inside] = documents + (positions[inside] - first + DOCUMENT_TOKENS - 1) // DOCUMENT_TOKENS
            documents += file.documents
        return found

    def asked_of_file(self, number: int) -> list[Int64Array]:
        """Of each question the positions inside a file, counted from its beginning, in the order asked."""
        first, end = self._first_tokens[number], self._first_tokens[number + 1]
        return [asked[(asked > first) & (asked <= end)] - first for asked in self._asked]


def _make_hole(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _make_index(path: Path, file: ShardFile, questions: list[Int64Array]) -> None:
    """A sparse index: the pages that hold entries which a binary search for the questions looks at, and the last."""
    entries = {file.documents - 1}
    for positions in questions:
        entries.update(_entries_looked_at(positions.tolist(), file.documents))
    pages = sorted({entry // _PAGE_ENTRIES for entry in entries})
    _make_hole(path, file.documents * INDEX_ENTRY_BYTES)
    with path.open("r+b") as opened:
        for page in pages:
            last = min((page + 1) * _PAGE_ENTRIES, file.documents)
            ends = np.arange(page * _PAGE_ENTRIES + 1, last + 1, dtype="<u8") * DOCUMENT_TOKENS
            opened.seek(page * _PAGE_ENTRIES * INDEX_ENTRY_BYTES)
            opened.write(np.minimum(ends, file.tokens).astype("<u8").tobytes())


def _entries_looked_at(keys: list[int], length: int) -> Iterator[int]:
    """What numpy.searchsorted looks at in an index of `length` entries: it narrows the search by the key before."""
    low, high, previous = 0, length, keys[0] if keys else 0
    for key in keys:
        if previous < key:
            high = length
        else:
            low, high = 0, min(high + 1, length)
        previous = key
        while low < high:
            middle = low + (high - low) // 2
            yield middle
            if min((middle + 1) * DOCUMENT_TOKENS, length * DOCUMENT_TOKENS) < key:
                low = middle + 1
            else:
                high = middle
        yield from (max(low - 1, 0), min(low + 8, length - 1))
