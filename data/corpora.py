"""The documents of a corpus source, split into training and validation text by hash.

A source is read in shards so that several workers can share it; what a shard holds depends on the source alone, never
on how many workers there are.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from data import arithmetic, python_text
from data.manifest import Inputs
from data.rejected import Rejected
from nanotron_recipes.errors import UserError, user_error
from nanotron_recipes.schema.data import Corpus, CorpusSource

SplitName = Literal["train", "validation"]

ARITHMETIC_DOCUMENTS = 40_000
"""Problems that are generated where the recipe does not say how many."""
_BUILT_IN_SHARDS = 2
_MOST_SHARDS = 256
_GLOBS = {
    "jsonl": ("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst"),
    "parquet": ("**/*.parquet",),
    "text": ("**/*.txt", "**/*.md"),
}


def is_validation(key: str, corpus: Corpus) -> bool:
    """Whether the document with this key is held out: by hash, so the same wherever and whenever it is read."""
    digest = hashlib.sha256(f"{corpus.seed}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < corpus.validation_fraction * 2**64


def num_shards(source: CorpusSource) -> int:
    """Into how many shards the training text of a source is cut."""
    if source.documents is not None and source.reader != "arithmetic":
        return 1
    if source.reader in _GLOBS:
        return min(len(files_of(source)[1]), _MOST_SHARDS)
    return _BUILT_IN_SHARDS


def documents(
    source: CorpusSource,
    corpus: Corpus,
    split: SplitName,
    *,
    shard: int = 0,
    shards: int = 1,
    rejected: Rejected | None = None,
) -> Iterator[str]:
    """The texts of shard `shard` of `shards` of one split of a source, in a fixed order.

    Raises UserError where the source's path does not exist or holds no file for the reader.
    """
    if source.reader == "arithmetic":
        yield from _arithmetic(source, corpus, split, shard, shards)
        return
    keyed = _keyed(source, shard, shards, Rejected() if rejected is None else rejected)
    for key, read in islice(keyed, source.documents):
        if is_validation(key, corpus) == (split == "validation") and (text := read()):
            yield text


def _keyed(
    source: CorpusSource, shard: int, shards: int, rejected: Rejected
) -> Iterator[tuple[str, Callable[[], str]]]:
    """Pairs of what is hashed for the split, and a function that reads the text ("" where there is none)."""
    if source.reader == "python-code":
        for name, path in python_text.module_files()[shard::shards]:
            yield name, partial(python_text.read_module, path)
    elif source.reader == "python-docs":
        # By the same name as its code, so that no held-out prose is in a training file of python-code.
        for name, path in python_text.module_files()[shard::shards]:
            yield name, partial(python_text.read_prose, path)
        for name, text in python_text.help_topics()[shard::shards]:
            yield f"help topic {name}", partial(str, text)
    else:
        from data.user_text import read_texts

        folder, files = files_of(source)
        for text in read_texts(source.reader, folder, files[shard::shards], source.text_key, rejected):
            yield text, partial(str, text)


def _arithmetic(source: CorpusSource, corpus: Corpus, split: SplitName, shard: int, shards: int) -> Iterator[str]:
    held_out = split == "validation"
    count = source.documents or ARITHMETIC_DOCUMENTS
    if held_out:
        count = round(count * corpus.validation_fraction)
    return (arithmetic.document(corpus.seed, i, held_out=held_out) for i in range(shard, count, shards))


def files_of(source: CorpusSource) -> tuple[Path, list[str]]:
    """The folder and the files, relative to it and sorted, that a jsonl, parquet or text source reads."""
    where = f"corpus.sources {source.name}"
    if source.path is None:
        raise UserError(f"{where}: path: expected a file or a folder for the reader {source.reader}")
    path = Path(source.path)
    try:
        if path.is_file():
            return path.parent, [path.name]
        if not path.is_dir():
            raise UserError(f"{where}: path: {path}: no such file or folder")
        globs = _GLOBS[source.reader] if source.glob is None else (source.glob,)
        matches = sorted({file for glob in globs for file in _matches(path, glob, where)})
        found = [file.relative_to(path).as_posix() for file in matches if file.is_file()]
        broken = next((file for file in matches if not file.exists()), None)
    except OSError as error:
        raise user_error(
            f"cannot be looked through: {error.strerror}", key=f"{where}: path", value=source.path
        ) from None
    if broken is not None:
        raise UserError(f"{where}: {broken}: a link to a file that is not there")
    if not found:
        raise UserError(f"{where}: path: {path}: no file matches {' or '.join(globs)}")
    return path, sorted(found)


def inputs_of(source: CorpusSource) -> Inputs | None:
    """The files that a source reads, told by name, size and time; null where it reads none.

    Raises UserError as `files_of` does.
    """
    if source.reader not in _GLOBS:
        return None
    folder, files = files_of(source)
    facts = [(name, (folder / name).stat()) for name in files]
    digest = hashlib.sha256(json.dumps([[name, fact.st_size, fact.st_mtime_ns] for name, fact in facts]).encode())
    return Inputs(files=len(facts), bytes=sum(fact.st_size for _, fact in facts), sha256=digest.hexdigest())


def _matches(path: Path, glob: str, where: str) -> list[Path]:
    try:
        if ".." in Path(glob).parts:
            raise ValueError("it leaves the folder")
        return list(path.glob(glob))
    except (ValueError, NotImplementedError) as error:
        expected = f"expected a pattern such as **/*.jsonl, relative to path ({error})"
        raise user_error(expected, key=f"{where}: glob", value=glob) from None
