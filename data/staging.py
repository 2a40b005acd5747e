"""Copies of what a run reads, on this machine's own disk, hashed on the way.

A file is written under a name of its own (`.<name>.part`) and gets its name when all of it is there, durable, and as
its manifest says; then `_staged.jsonl` gets a line about it (data/staged.py). A source's manifest comes last.
"""

import errno
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

from data.manifest import MANIFEST_NAME, Manifest, parse_manifest
from data.origins import Origin, open_origin
from data.places import Place, place_of, source_names
from data.readings import files_read
from data.sources import check_manifests
from data.staged import StagedLog, file_as_it_is, read_staged
from data.transfer import TransferFailed, Watch
from data.verification import ExpectedFile, expected_files, file_problem
from nanotron_recipes.errors import UserError
from nanotron_recipes.files import sync, write_atomic
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.variables import require_variables

_SPARE = 0.01
"""Part of what is staged that has to be free beyond it, for what a file system keeps for itself."""


class StagingFailed(RuntimeError):
    """Not everything could be staged; the message says why, in a line. What was staged stays."""


@dataclass(frozen=True)
class SourceToStage:
    """A source, with what of it a run reads."""

    place: Place
    origin: Origin
    manifest: Manifest
    manifest_bytes: bytes
    files: list[ExpectedFile]
    """Where the copies are to lie, and what they are to be."""
    staged: list[ExpectedFile]
    """Those of them that are there, unchanged since they were staged."""

    @property
    def folder(self) -> Path:
        """Where the copies lie."""
        return self.place.folder

    @property
    def missing(self) -> list[ExpectedFile]:
        """Files that are to be copied, or to be hashed again."""
        there = set(self.staged)
        return [file for file in self.files if file not in there]

    @property
    def all_bytes(self) -> int:
        """Of everything in the source, whether the run reads it or not."""
        return sum(file.size for file in expected_files(self.folder, self.manifest))


@dataclass(frozen=True)
class Staging:
    """What is to be staged for a run of a recipe."""

    sources: list[SourceToStage] = field(default_factory=list)

    @property
    def bytes_to_stage(self) -> int:
        """Bytes that are to be copied, or to be hashed where they are."""
        return sum(file.size for source in self.sources for file in source.missing)


def plan_staging(recipe: Recipe, watch: Watch | None = None) -> Staging:
    """Looks at the origins' manifests and at what is here. Copies nothing.

    Raises UserError where a source is not there or does not fit the recipe, TransferFailed where it cannot be reached.
    """
    require_variables(recipe)
    watch = watch or Watch()
    places = [place_of(recipe, name) for name in source_names(recipe)]
    for place in places:
        place.folder  # noqa: B018  # raises where there is no place for a copy
    origins = {place.name: open_origin(place.origin, recipe.data_staging) for place in places}
    texts = {place.name: _manifest_text(place, origins[place.name], watch) for place in places}
    manifests = {place.name: parse_manifest(texts[place.name], f"{place.origin}/{MANIFEST_NAME}") for place in places}
    check_manifests(recipe, {place.name: (place.origin, manifests[place.name]) for place in places})
    copied = [place for place in places if place.copy is not None]
    read = files_read(recipe, {place.name: manifests[place.name] for place in copied})
    sources = []
    for place in copied:
        files = expected_files(place.folder, manifests[place.name], set(read[place.name]))
        copies = read_staged(place.folder)
        if copies is None:
            _refuse_other_source(place, texts[place.name])
        staged = [file for file in files if copies is not None and copies.change_of(file) is None]
        sources.append(
            SourceToStage(place, origins[place.name], manifests[place.name], texts[place.name], files, staged)
        )
    return Staging(sources)


def _refuse_other_source(place: Place, text: bytes) -> None:
    path = place.folder / MANIFEST_NAME
    if path.exists() and path.read_bytes() != text:
        raise UserError(
            f"{path}: not that of {place.origin}, and nothing here was staged; expected a folder of its own"
        )


def _manifest_text(place: Place, origin: Origin, watch: Watch) -> bytes:
    text = origin.read(MANIFEST_NAME, watch)
    if text is None:
        raise UserError(
            f"data_stages dataset_folder: {place.name}: {place.origin}: no {MANIFEST_NAME} in it; run "
            "`nanotron-recipes tokenize RECIPE` first"
        )
    return text


def check_space(staging: Staging) -> None:
    """UserError where a disk has not the room for what is to be copied to it."""
    wanted: dict[int, int] = defaultdict(int)
    where: dict[int, Path] = {}
    for source in staging.sources:
        folder = _existing(source.folder)
        device = folder.stat().st_dev
        where.setdefault(device, folder)
        wanted[device] += sum(file.size - _already_there(file) for file in source.missing)
    for device, size in wanted.items():
        free = shutil.disk_usage(where[device]).free
        if size and size * (1 + _SPARE) > free:
            raise UserError(
                f"{where[device]}: {_gigabytes(size)} are to be staged and {_gigabytes(free)} are free; make room, or "
                "stage elsewhere (data_staging.path, dataset_read_path)"
            )


def stage(recipe: Recipe, staging: Staging, watch: Watch) -> None:
    """Stages everything that is missing, several files at a time.

    Called again after whatever ended it, it goes on with what is there. Raises UserError where a source is damaged or
    a file in the way was not staged by us, StagingFailed where the network or the disk gives up.
    """
    check_space(staging)
    watch = replace(watch, stop=Event())
    with ExitStack() as stack:
        tasks = []
        for source in staging.sources:
            if source.missing:
                log = stack.enter_context(StagedLog(source.folder))
                ours = read_staged(source.folder)
                names = set(ours.files) if ours is not None else set()
                tasks += [_Task(source, file, log, names) for file in source.missing]
        tasks.sort(key=lambda task: -task.file.size)
        _run(tasks, recipe.data_staging.workers, watch, staging)
    for source in staging.sources:
        _write_manifest(source)


@dataclass(frozen=True)
class _Task:
    source: SourceToStage
    file: ExpectedFile
    log: StagedLog
    ours: set[str]
    """Names of the files that an earlier staging wrote."""


def _run(tasks: list[_Task], workers: int, watch: Watch, staging: Staging) -> None:
    """All tasks; the first that fails ends the others."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="staging")
    try:
        for done in as_completed([pool.submit(_stage_file, task, watch) for task in tasks]):
            done.result()
    except TransferFailed as error:
        raise StagingFailed(str(error)) from None
    except OSError as error:
        raise _disk_failed(error, staging) from error
    finally:
        watch.stop.set()
        pool.shutdown(cancel_futures=True)


def _disk_failed(error: OSError, staging: Staging) -> StagingFailed:
    path = Path(os.fsdecode(error.filename)) if error.filename else staging.sources[0].folder
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return StagingFailed(f"{path}: {error.strerror or error}")
    free = shutil.disk_usage(_existing(path)).free
    return StagingFailed(
        f"{path}: {(error.strerror or '').lower()}: {_gigabytes(free)} are free; make room and call again: what is "
        "staged stays"
    )


def _stage_file(task: _Task, watch: Watch) -> None:
    """One file: hashed where it is already, else copied."""
    file, path = task.file, task.file.path
    part = path.with_name(f".{path.name}.part")
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            found = file_as_it_is(file, file.sha256)
            if _is_right(file, watch) and found == file_as_it_is(file, file.sha256):
                task.log.add(found)
                return
            _may_replace(task, watch)
        _copy(task, part, watch)
        part.replace(path)
        sync(path.parent)
        task.log.add(file_as_it_is(file, file.sha256))


def _may_replace(task: _Task, watch: Watch) -> None:
    path = task.file.path
    if task.file.name not in task.ours:
        raise UserError(
            f"{path}: not what the manifest in {task.source.place.origin} says, and not staged by us; move it away"
        )
    watch.note(f"{path}: not as it was staged any more; staged again")


def _is_right(file: ExpectedFile, watch: Watch) -> bool:
    told = 0

    def count(read: int) -> None:
        nonlocal told
        told += read
        watch.check()
        watch.advance(read)

    if file_problem(file, count) is None:
        return True
    watch.advance(-told)
    return False


def _copy(task: _Task, part: Path, watch: Watch) -> None:
    """All of the file to `part`. What an earlier attempt left there may be of another file: once it begins anew."""
    expected = task.file
    for had_some in (part.exists(), False):
        digest = task.source.origin.copy(expected.name, expected.size, part, watch)
        if digest == expected.sha256:
            return
        watch.advance(-part.stat().st_size)
        part.unlink()
        if not had_some:
            break
    raise UserError(f"{task.source.place.origin}/{expected.name}: its content is not what its manifest says (sha256)")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of the system that names no file is about this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _write_manifest(source: SourceToStage) -> None:
    path = source.folder / MANIFEST_NAME
    if not path.exists() or path.read_bytes() != source.manifest_bytes:
        write_atomic(path, source.manifest_bytes)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _already_there(file: ExpectedFile) -> int:
    """Bytes of a file that need no more room."""
    found: Iterable[Path] = (file.path, file.path.with_name(f".{file.path.name}.part"))
    return min(file.size, max(path.stat().st_size if path.exists() else 0 for path in found))


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
