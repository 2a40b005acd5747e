"""From a recipe's corpus to tokenized shards with manifests; to be called again after any interruption.

    corpora/<name>/tokenizer/                 the trained tokenizer, Hugging Face form
    corpora/<name>/<source>/*.ds[.index]      training shards, manifest.json
    corpora/<name>/<source>/validation/       held-out shards

Unfinished work lies in `.tokenizing-<hash>` beside them. A source's folder takes its name in one rename when all its
shards and its manifest are complete, so that a crash leaves nothing behind that could be taken for data.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from data.corpora import documents
from data.corpus_folder import (
    is_made_with,
    locked,
    made_before,
    made_by_tokenize,
    move_finished,
    pending_sources,
    remove_unfinished,
    unfinished_folder,
)
from data.corpus_tokenizer import ensure_tokenizer, present_tokenizer, tokenizer_notes
from data.finish import finish_source
from data.manifest import MANIFEST_NAME, Inputs, Manifest, read_manifest
from data.parts import whole_files
from data.rejected import NO_TEXT, NOT_JSON, Rejected
from data.text_files import TextIsGone, files_of, inputs_of
from data.tokenization_job import DISK_IS_FULL, Job, packed_notes, source_folder, tasks_of, with_absolute_paths
from data.tokenization_process import run_job
from data.tokenizer import TRAINING_VERSION, TokenizerInfo, read_tokenizer, tokenizer_folder
from data.upload import upload_corpus
from nanotron_recipes.errors import UserError, nearest_name, one_line, user_error
from nanotron_recipes.machine import usable_cpus
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.data import Corpus, CorpusSource

SETTINGS_VERSION = 3
"""Part of every settings hash: raise it when the same settings shall make other shards than before."""
_KEYS_SHOWN = 10


def tokenize(
    recipe: Recipe,
    recipe_name: str,
    *,
    workers: int | None = None,
    console: Console | None = None,
    starter: Sequence[str] = (),
) -> list[Manifest]:
    """Makes the tokenizer and the shards of every source that are not there yet; their manifests, in source order.

    Does nothing, in moments, where all manifests were made with the recipe's present settings (text is not read again).
    `workers` is the number of processes that encode (null: one a CPU) on each of the nodes on which `starter` starts
    them (see `run_job`; none: on this one). Raises UserError for what the user can mend (missing path, a link to
    nothing among the files, empty corpus, wrong text_key, a tokenizer with more tokens than the model) and
    TokenizationFailed where the worker fails.
    """
    console = console or Console(quiet=True)
    corpus = recipe.corpus
    if corpus is None:
        raise UserError(f"{recipe_name}: corpus: missing; there is nothing to tokenize")
    settings = _settings(recipe, corpus)
    present = present_tokenizer(recipe)
    pending = pending_sources(corpus, settings.sources, present)
    for source in corpus.sources:
        if source.name in settings.notes and source not in pending:
            _say(console, f"note: {settings.notes[source.name]}")
    if not pending and present is not None:
        _say(console, f"{corpus.path}: all sources are tokenized already")
        return _uploaded(recipe, corpus, console)
    started = time.perf_counter()
    with locked(Path(corpus.path)), _named_space(corpus):
        _check_readable(corpus, pending_sources(corpus, settings.sources, present))
        tokenizer = ensure_tokenizer(recipe, corpus, settings.tokenizer, console)
        pending = pending_sources(corpus, settings.sources, tokenizer)
        if not _work_folder(corpus, pending, settings, tokenizer).is_dir():
            # It goes on with no unfinished work as that is; of such work what is complete is kept.
            move_finished(corpus, settings.sources, tokenizer)
            pending = pending_sources(corpus, settings.sources, tokenizer)
        for line in _changes(corpus, settings, tokenizer):
            _say(console, line)
        if pending:
            for note in tokenizer_notes(recipe, tokenizer):
                _say(console, f"note: {note}")
            _make(corpus, pending, settings, tokenizer, workers or usable_cpus(), console, starter)
            move_finished(corpus, settings.sources, tokenizer)
        remove_unfinished(corpus)
    manifests = _manifests(corpus)
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
    return _uploaded(recipe, corpus, console)


@contextmanager
def _named_space(corpus: Corpus) -> Iterator[None]:
    """Where a disk is full, most of what writes to it does not say which."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        raise UserError(f"{error.filename or corpus.path}: {error.strerror}; make room there and call again") from None


def _manifests(corpus: Corpus) -> list[Manifest]:
    return [read_manifest(Path(corpus.path, source.name)) for source in corpus.sources]


def _uploaded(recipe: Recipe, corpus: Corpus, console: Console) -> list[Manifest]:
    """The manifests of all sources, which are on S3 then where the recipe says so."""
    manifests = _manifests(corpus)
    if corpus.upload_to is not None:
        upload_corpus(corpus, manifests, tokenizer_folder(recipe), partial(_say, console))
    return manifests


def _say(console: Console, line: str) -> None:
    console.print(one_line(line), soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True)
class TextFound:
    """How the shards of a corpus stand to its text as it is now, a line a source."""

    outdated: list[str]
    """Shards made with other settings, or of other files, than `tokenize` would use."""
    gone: list[str]
    """Shards of text that is not there any more or cannot be reached; they are used as they are."""


def look_at_text(recipe: Recipe) -> TextFound:
    """Compares shards with text, of which nothing is read. Raises UserError where only some of it can be looked at."""
    if recipe.corpus is None or (recipe.tokenizer.tokenizer_name_or_path is None and recipe.tokenizer.train is None):
        return TextFound([], [])
    settings = _settings(recipe, recipe.corpus)
    return TextFound(_changes(recipe.corpus, settings, None), [*settings.notes.values()])


def _changes(corpus: Corpus, settings: "_Settings", tokenizer: TokenizerInfo | None) -> list[str]:
    lines = []
    for source in corpus.sources:
        made, now = made_before(corpus, source), settings.inputs[source.name]
        if made is None or is_made_with(made, settings.sources[source.name], tokenizer):
            continue
        why = "made with other settings or another tokenizer"
        if not made_by_tokenize(Path(corpus.path, source.name), made):
            why = "its shards were not made by `tokenize`"
        elif made.inputs is not None and now is not None and made.inputs != now:
            facts = f"{made.inputs} then, {now} now" if str(made.inputs) != str(now) else f"{now}, written again"
            why = f"its files have changed since ({facts})"
        lines.append(f"{source.name}: to be tokenized again: {why}")
    return lines


@dataclass(frozen=True)
class _Settings:
    """What the tokenizer and the shards of a recipe follow from."""

    tokenizer: str
    """Hash of what a trained tokenizer follows from; of the file, where it is given."""
    sources: dict[str, str]
    """Hash, by source, of what its shards follow from."""
    inputs: dict[str, Inputs | None]
    """By source, the files that it reads; null for what comes with Python."""
    notes: dict[str, str]
    """By source, why its text cannot be read any more."""


def _settings(recipe: Recipe, corpus: Corpus) -> _Settings:
    folder = tokenizer_folder(recipe)
    common = {"version": SETTINGS_VERSION, "fraction": corpus.validation_fraction, "seed": corpus.seed}
    inputs: dict[str, Inputs | None] = {}
    notes = {}
    for source in corpus.sources:
        try:
            inputs[source.name] = inputs_of(source)
        except TextIsGone as error:
            # Text that is gone is no reason to do without its shards; where there are none, it is missed later.
            made = made_before(corpus, source)
            inputs[source.name] = made.inputs if made else None
            if made:
                notes[source.name] = f"{error}; the shards made before are used"
    sources = [
        source.model_dump(exclude={"needs_network"}) | {"files": found.sha256 if found else None}
        for source, found in zip(corpus.sources, inputs.values(), strict=True)
    ]
    if recipe.tokenizer.tokenizer_name_or_path is not None:
        tokenizer = read_tokenizer(folder).sha256
    else:
        assert recipe.tokenizer.train is not None, "tokenizer_folder has checked it"
        tokenizer = _hash([common, TRAINING_VERSION, recipe.tokenizer.train.vocab_size, sources])
    hashes = {source["name"]: _hash([common, tokenizer, source]) for source in sources}
    return _Settings(tokenizer, hashes, inputs, notes)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _check_readable(corpus: Corpus, sources: list[CorpusSource]) -> None:
    """Finds out before any work whether each source has a document at all."""
    for source in sources:
        rejected = Rejected()
        train = documents(source, corpus, "train", rejected=rejected)
        if next(train, None) is None and next(documents(source, corpus, "validation"), None) is None:
            raise empty_source(source, rejected)


def empty_source(source: CorpusSource, rejected: Rejected) -> UserError:
    """What is wrong with a source without a document: with its text_key, as far as what was rejected shows it."""
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
    reasons = ", ".join(f"{count} × {reason}" for reason, count in rejected.counts.items())
    text = files_of(source) if source.path else None
    names = [part.where for part in whole_files(text)] if text else []
    looked = names[0] if len(names) == 1 else f"{text.folder if text else '.'}: {len(names)} files"
    return UserError(f"{where}: {looked}: no document in there" + (f" ({reasons})" if reasons else ""))


def _work_folder(corpus: Corpus, pending: list[CorpusSource], settings: _Settings, tokenizer: TokenizerInfo) -> Path:
    """Where the unfinished work of just these sources lies, with these settings and this tokenizer."""
    return unfinished_folder(corpus, _hash([tokenizer.sha256, [settings.sources[each.name] for each in pending]])[:12])


def _make(
    corpus: Corpus,
    pending: list[CorpusSource],
    settings: _Settings,
    tokenizer: TokenizerInfo,
    workers: int,
    console: Console,
    starter: Sequence[str],
) -> None:
    """Encodes the pending sources and completes their folders, still among the unfinished work."""
    named = {source.name for source in pending}
    absolute = with_absolute_paths(corpus)
    tasks = tasks_of([source for source in absolute.sources if source.name in named], corpus.validation_fraction)
    for line in packed_notes(tasks, workers):
        _say(console, line)
    folder = _work_folder(corpus, pending, settings, tokenizer)
    remove_unfinished(corpus, keep=folder)
    job = Job(
        corpus=absolute,
        tasks=tasks,
        tokenizer_file=str(tokenizer.file.absolute()),
        eos_token=tokenizer.eos_token,
        token_bytes=tokenizer.token_bytes,
        folder=folder.absolute(),
        workers=workers,
    )
    run_job(job, console, starter)
    for source in pending:
        name = source.name
        if not (source_folder(folder, name) / MANIFEST_NAME).is_file():
            finish_source(job, name, tokenizer, settings.sources[name], settings.inputs[name], console)
