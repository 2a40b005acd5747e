"""The documents of a corpus source, split into training and validation text by hash.

A source is read in shards so that several workers can share it; what a shard holds depends on the source alone, never
on how many workers there are.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Literal

from data import arithmetic, python_text
from data.parts import shares_of, whole_files
from data.rejected import Rejected
from data.text_files import GLOBS, files_of
from data.text_part import Part
from nanotron_recipes.schema.data import Corpus, CorpusSource

SplitName = Literal["train", "validation"]

ARITHMETIC_DOCUMENTS = 40_000
"""Problems that are generated where the recipe does not say how many."""
_BUILT_IN_SHARDS = 2


def is_validation(key: str, corpus: Corpus) -> bool:
    """Whether the document with this key is held out: by hash, so the same wherever and whenever it is read."""
    digest = hashlib.sha256(f"{corpus.seed}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < corpus.validation_fraction * 2**64


def shards_of(source: CorpusSource) -> list[list[Part]]:
    """The shards of a source's training text, each with the parts of files that it is read from (none where the text
    is not read from files). Raises UserError as `files_of` does."""
    if source.reader not in GLOBS:
        is_limited = source.documents is not None and source.reader != "arithmetic"
        return [[]] * (1 if is_limited else _BUILT_IN_SHARDS)
    shares = shares_of(source.reader, files_of(source), source.text_key)
    return shares if source.documents is None else [_all_of(shares)]


def _all_of(shares: Sequence[Sequence[Part]]) -> list[Part]:
    return [part for share in shares for part in share]


def documents(
    source: CorpusSource,
    corpus: Corpus,
    split: SplitName,
    *,
    shard: int = 0,
    shards: int = 1,
    parts: Sequence[Part] | None = None,
    rejected: Rejected | None = None,
) -> Iterator[str]:
    """The texts of shard `shard` of `shards` of one split of a source, in a fixed order; of a source of files, those in
    `parts` (null: in all files).

    Raises UserError where the source's path does not exist or holds no file for the reader.
    """
    if source.reader == "arithmetic":
        yield from _arithmetic(source, corpus, split, shard, shards)
        return
    rejected = Rejected() if rejected is None else rejected
    keyed = _of_files(source, parts, rejected) if source.reader in GLOBS else _of_python(source, shard, shards)
    for key, read in islice(keyed, source.documents):
        if is_validation(key, corpus) == (split == "validation") and (text := read()):
            yield text


def _of_files(
    source: CorpusSource, parts: Sequence[Part] | None, rejected: Rejected
) -> Iterator[tuple[str, Callable[[], str]]]:
    """Pairs of what is hashed for the split, and a function that returns the text."""
    from data.user_text import read_texts

    if parts is None:
        parts = whole_files(files_of(source))
    for text in read_texts(source.reader, parts, source.text_key, rejected):
        yield text, partial(str, text)


def _of_python(source: CorpusSource, shard: int, shards: int) -> Iterator[tuple[str, Callable[[], str]]]:
    """Pairs of what is hashed for the split, and a function that reads the text ("" where there is none)."""
    if source.reader == "python-code":
        for name, path in python_text.module_files()[shard::shards]:
            yield name, partial(python_text.read_module, path)
        return
    # By the same name as its code, so that no held-out prose is in a training file of python-code.
    for name, path in python_text.module_files()[shard::shards]:
        yield name, partial(python_text.read_prose, path)
    for name, text in python_text.help_topics()[shard::shards]:
        yield f"help topic {name}", partial(str, text)


def _arithmetic(source: CorpusSource, corpus: Corpus, split: SplitName, shard: int, shards: int) -> Iterator[str]:
    held_out = split == "validation"
    count = source.documents or ARITHMETIC_DOCUMENTS
    if held_out:
        count = round(count * corpus.validation_fraction)
    return (arithmetic.document(corpus.seed, i, held_out=held_out) for i in range(shard, count, shards))
