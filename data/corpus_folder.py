"""The folder of a corpus: which sources are complete in it, what of it is ours to replace, and what is not."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from data.manifest import MANIFEST_NAME, Manifest, read_manifest
from data.tokenization_job import source_folder
from data.tokenizer import TokenizerInfo
from nanotron_recipes.errors import UserError
from nanotron_recipes.files import sync
from nanotron_recipes.schema.data import Corpus, CorpusSource

_UNFINISHED = ".tokenizing-"
_FILES_NAMED = 3


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the corpus' folder, and keeps other processes from tokenizing into it; UserError where one does.

    Where the block raises, the lock's file goes, and so do the folders that were made and are empty.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock"
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(folder) from None
        if os.fstat(opened.fileno()).st_nlink == 0:  # another had it until this moment, failed, and removed it
            raise _busy(folder)
        try:
            yield
        except BaseException:
            file.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                for path in made:
                    path.rmdir()
            raise


def _busy(folder: Path) -> UserError:
    return UserError(f"{folder}: another process is tokenizing into this folder; wait for it")


def made_before(corpus: Corpus, source: CorpusSource) -> Manifest | None:
    """The manifest of the shards that a source has, made with whatever settings; None where there are none."""
    folder = Path(corpus.path, source.name)
    return read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None


def made_by_tokenize(folder: Path, manifest: Manifest) -> bool:
    """Whether `tokenize` made the shards in `folder`, so that it can make them again.

    Where the manifest does not say, the `.metadata` does that `tokenize` leaves beside every shard.
    """
    if manifest.made_by is not None:
        return manifest.made_by == "tokenize"
    files = (*manifest.train.files, *manifest.validation.files)
    return all((folder / f"{file.name}.metadata").is_file() for file in files)


def is_made_with(manifest: Manifest, settings_sha256: str, tokenizer: TokenizerInfo | None) -> bool:
    """Whether shards were made with these settings and, where it is given, with this tokenizer."""
    of_tokenizer = tokenizer is None or manifest.tokenizer_sha256 == tokenizer.sha256
    return manifest.settings_sha256 == settings_sha256 and of_tokenizer


def pending_sources(corpus: Corpus, settings: Mapping[str, str], tokenizer: TokenizerInfo | None) -> list[CorpusSource]:
    """The sources whose shards are missing or were made with other settings than these, a hash for each name, or with
    another tokenizer (null: with whichever).

    Raises UserError where something is in their place that `tokenize` has not made.
    """
    pending = []
    for source in corpus.sources:
        manifest = made_before(corpus, source)
        if manifest is None or not is_made_with(manifest, settings[source.name], tokenizer):
            _refuse_foreign_files(Path(corpus.path, source.name), manifest)
            pending.append(source)
    return pending


def _refuse_foreign_files(folder: Path, manifest: Manifest | None) -> None:
    """UserError where a source's folder, about to be replaced, holds anything but the shards that `tokenize` made."""
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder}: expected a free place for shards; a file is in the way")
        return
    ours = {"validation"}
    if manifest is not None and made_by_tokenize(folder, manifest):
        ours.add(MANIFEST_NAME)
        for file in (*manifest.train.files, *manifest.validation.files):
            ours |= {file.name, f"{file.name}.index", f"{file.name}.metadata"}
    foreign = sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*")} - ours)
    if foreign:
        more = f" and {len(foreign) - _FILES_NAMED} more" if len(foreign) > _FILES_NAMED else ""
        raise UserError(
            f"{folder}: expected a free place for shards; `tokenize` did not make "
            f"{', '.join(foreign[:_FILES_NAMED])}{more} in there; move that away first"
        )


def unfinished_folder(corpus: Corpus, name: str) -> Path:
    """Where the unfinished work of this name (hexadecimal digits) lies."""
    return Path(corpus.path, _UNFINISHED + name)


def move_finished(corpus: Corpus, settings: Mapping[str, str], tokenizer: TokenizerInfo) -> None:
    """Gives folders of sources that are complete, with these settings and this tokenizer, their final names; what they
    replace goes to the unfinished work."""
    for unfinished in _unfinished(corpus):
        for source in corpus.sources:
            made = source_folder(unfinished, source.name)
            if not (made / MANIFEST_NAME).is_file():
                continue
            if not is_made_with(read_manifest(made), settings[source.name], tokenizer):
                continue
            final = Path(corpus.path, source.name)
            if final.exists():
                _refuse_foreign_files(final, made_before(corpus, source))
                replaced = unfinished / "replaced" / source.name
                replaced.parent.mkdir(exist_ok=True)
                final.rename(replaced)
            made.rename(final)
            sync(Path(corpus.path))


def remove_unfinished(corpus: Corpus, keep: Path | None = None) -> None:
    """Removes all unfinished work but `keep`."""
    for folder in _unfinished(corpus):
        if folder != keep:
            shutil.rmtree(folder)


def _unfinished(corpus: Corpus) -> list[Path]:
    found = sorted(Path(corpus.path).glob(f"{_UNFINISHED}*"))
    return [path for path in found if re.fullmatch("[0-9a-f]{12}", path.name.removeprefix(_UNFINISHED))]
