"""From a recipe's corpus to tokenized shards with manifests; to be called again after any interruption.

    corpora/<name>/tokenizer/                 the trained tokenizer, Hugging Face form
    corpora/<name>/<source>/*.ds[.index]      training shards, manifest.json
    corpora/<name>/<source>/validation/       held-out shards

Unfinished work lies in `.tokenizing-<hash>` beside them. A source's folder takes its name in one rename when all its
shards and its manifest are complete, so that a crash leaves nothing behind that could be taken for data.
"""

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from data.corpora import documents, files_of
from data.finish import finish_source
from data.manifest import MANIFEST_NAME, Manifest, read_manifest
from data.rejected import NO_TEXT, NOT_JSON, Rejected
from data.tokenization_job import Job, source_folder, tasks_of
from data.tokenization_process import run_job
from data.tokenizer import TokenizerInfo, read_tokenizer, tokenizer_folder, train_tokenizer
from nanotron_recipes.errors import UserError, nearest_name, user_error
from nanotron_recipes.files import sync, write_atomic
from nanotron_recipes.machine import usable_cpus
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.data import Corpus, CorpusSource

SETTINGS_VERSION = 1
"""Part of every settings hash: raise it when the same settings shall make other shards than before."""
_UNFINISHED = ".tokenizing-"
_KEYS_SHOWN = 10


def tokenize(
    recipe: Recipe, recipe_name: str, *, workers: int | None = None, console: Console | None = None
) -> list[Manifest]:
    """Makes the tokenizer and the shards of every source that are not there yet; their manifests, in source order.

    Does nothing, in moments, where all manifests were made with the recipe's present settings (text is not read again).
    `workers` is the number of processes that encode (null: one a CPU). Raises UserError for what the user can mend
    (missing path, empty corpus, wrong text_key, wrong vocabulary size) and TokenizationFailed where the worker fails.
    """
    console = console or Console(quiet=True)
    corpus = recipe.corpus
    if corpus is None:
        raise UserError(f"{recipe_name}: corpus: missing; there is nothing to tokenize")
    settings = _settings(recipe, corpus)
    if not _pending(corpus, settings):
        _say(console, f"{corpus.path}: all sources are tokenized already")
        return [read_manifest(Path(corpus.path, source.name)) for source in corpus.sources]
    started = time.perf_counter()
    with _locked(Path(corpus.path)):
        _move_finished(corpus, settings)
        pending = _pending(corpus, settings)
        _check_readable(corpus, pending)
        tokenizer = _ensure_tokenizer(recipe, corpus, console)
        if pending:
            _make(corpus, pending, settings, tokenizer, workers or usable_cpus(), console)
            _move_finished(corpus, settings)
        _remove_unfinished(corpus)
    manifests = [read_manifest(Path(corpus.path, source.name)) for source in corpus.sources]
    tokens = sum(manifest.train.tokens + manifest.validation.tokens for manifest in manifests)
    seconds = time.perf_counter() - started
    for source, manifest in zip(corpus.sources, manifests, strict=True):
        if corpus.validation_fraction > 0 and manifest.validation.tokens == 0:
            _say(
                console,
                f"note: {source.name}: none of its {manifest.train.documents} documents is held out, so it has no "
                f"validation loss; raise corpus.validation_fraction ({corpus.validation_fraction:g})",
            )
    names = ", ".join(source.name for source in corpus.sources)
    _say(console, f"{corpus.path}: {names}: {tokens:,} tokens in {seconds:.1f} s")
    return manifests


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True)
class _Settings:
    tokenizer: str
    """Hash of what a trained tokenizer follows from; of the file, where it is given."""
    sources: dict[str, str]
    """Hash, by source, of what its shards follow from."""


def _settings(recipe: Recipe, corpus: Corpus) -> _Settings:
    folder = tokenizer_folder(recipe)
    common = {"version": SETTINGS_VERSION, "fraction": corpus.validation_fraction, "seed": corpus.seed}
    sources = [source.model_dump(exclude={"needs_network"}) for source in corpus.sources]
    if recipe.tokenizer.tokenizer_name_or_path is not None:
        tokenizer = read_tokenizer(folder).sha256
    else:
        assert recipe.tokenizer.train is not None, "tokenizer_folder has checked it"
        tokenizer = _hash([common, recipe.tokenizer.train.vocab_size, sources])
    return _Settings(tokenizer, {source["name"]: _hash([common, tokenizer, source]) for source in sources})


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _pending(corpus: Corpus, settings: _Settings) -> list[CorpusSource]:
    """The sources whose shards are missing or were made with other settings."""
    pending = []
    for source in corpus.sources:
        folder = Path(corpus.path, source.name)
        if not (folder / MANIFEST_NAME).is_file():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"{folder}: expected a free place for shards; it is there and has no {MANIFEST_NAME}")
            pending.append(source)
        elif read_manifest(folder).settings_sha256 != settings.sources[source.name]:
            pending.append(source)
    return pending


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is tokenizing into this folder; wait for it") from None
        yield


def _check_readable(corpus: Corpus, sources: list[CorpusSource]) -> None:
    """Finds out before any work whether each source has a document at all."""
    for source in sources:
        rejected = Rejected()
        train = documents(source, corpus, "train", rejected=rejected)
        if next(train, None) is None and next(documents(source, corpus, "validation"), None) is None:
            raise _empty(source, rejected)


def _empty(source: CorpusSource, rejected: Rejected) -> UserError:
    where = f"corpus.sources {source.name}"
    if rejected.keys_seen and set(rejected.counts) <= {NOT_JSON, NO_TEXT}:
        names = sorted(rejected.keys_seen)
        shown = ", ".join([*names[:_KEYS_SHOWN], *["…"][: len(names) > _KEYS_SHOWN]])
        return user_error(
            f"no document has text there (keys: {shown})",
            key=f"{where}: text_key",
            value=source.text_key,
            nearest=nearest_name(source.text_key, rejected.keys_seen),
        )
    folder, files = files_of(source) if source.path else (Path(), [])
    reasons = ", ".join(f"{count} × {reason}" for reason, count in rejected.counts.items())
    looked = folder / files[0] if len(files) == 1 else f"{folder}: {len(files)} files"
    return UserError(f"{where}: {looked}: no document in there" + (f" ({reasons})" if reasons else ""))


def _ensure_tokenizer(recipe: Recipe, corpus: Corpus, console: Console) -> TokenizerInfo:
    folder = tokenizer_folder(recipe)
    train = recipe.tokenizer.train
    if recipe.tokenizer.tokenizer_name_or_path is None:
        assert train is not None, "tokenizer_folder has checked it"
        _check_vocab_size(recipe, train.vocab_size, "tokenizer.train.vocab_size is")
        made_with = Path(corpus.path, "tokenizer.settings")
        settings = _settings(recipe, corpus).tokenizer
        if not made_with.is_file() or made_with.read_text().strip() != settings:
            _say(console, f"training a tokenizer of {train.vocab_size:,} entries")
            made_with.unlink(missing_ok=True)
            train_tokenizer(corpus, train.vocab_size, folder)
            write_atomic(made_with, settings + "\n")
    tokenizer = read_tokenizer(folder)
    _check_vocab_size(recipe, tokenizer.vocab_size, f"the tokenizer {folder} has")
    return tokenizer


def _check_vocab_size(recipe: Recipe, found: int, where: str) -> None:
    vocab_size = recipe.model.architecture.vocab_size
    if found != vocab_size:
        raise UserError(f"model.model_config.vocab_size: {vocab_size}: {where} {found}")


def _make(
    corpus: Corpus,
    pending: list[CorpusSource],
    settings: _Settings,
    tokenizer: TokenizerInfo,
    workers: int,
    console: Console,
) -> None:
    """Encodes the pending sources and completes their folders, still among the unfinished work."""
    tasks = tasks_of(pending, with_validation=corpus.validation_fraction > 0)
    name = _hash([tokenizer.sha256, [settings.sources[source.name] for source in pending]])[:12]
    folder = Path(corpus.path, _UNFINISHED + name)
    _remove_unfinished(corpus, keep=folder)
    job = Job(
        corpus=corpus,
        tasks=tasks,
        tokenizer_file=str(tokenizer.file),
        eos_token=tokenizer.eos_token,
        folder=folder,
        workers=workers,
    )
    run_job(job, console)
    for source in pending:
        finish_source(job, source.name, tokenizer, settings.sources[source.name], console)


def _unfinished(corpus: Corpus) -> list[Path]:
    return sorted(Path(corpus.path).glob(f"{_UNFINISHED}*"))


def _move_finished(corpus: Corpus, settings: _Settings) -> None:
    """Gives complete folders of sources their final names."""
    for unfinished in _unfinished(corpus):
        for source in corpus.sources:
            made = source_folder(unfinished, source.name)
            if not (made / MANIFEST_NAME).is_file():
                continue
            if read_manifest(made).settings_sha256 != settings.sources[source.name]:
                continue
            final = Path(corpus.path, source.name)
            if final.exists():
                replaced = unfinished / "replaced" / source.name
                replaced.parent.mkdir(exist_ok=True)
                final.rename(replaced)
            made.rename(final)
            sync(Path(corpus.path))


def _remove_unfinished(corpus: Corpus, keep: Path | None = None) -> None:
    for folder in _unfinished(corpus):
        if folder != keep:
            shutil.rmtree(folder)
