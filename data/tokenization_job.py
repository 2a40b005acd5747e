"""What `tokenize` hands to its worker process, and where both keep unfinished work."""

import errno
from math import ceil
from pathlib import Path

from pydantic import BaseModel

from data.corpora import SplitName, shards_of
from data.parts import PART_BYTES, deal, is_packed
from data.text_part import Part
from nanotron_recipes.schema.data import Corpus, CorpusSource
from nanotron_recipes.urls import is_url

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk without room says; the worker process, which then can write nothing any more, ends with that status."""


class Task(BaseModel):
    """One shard of one split of one source."""

    source: str
    split: SplitName
    shard: int
    shards: int
    parts: list[Part]
    """Of files; empty for a source that is not read from files."""

    @property
    def size(self) -> int:
        """Bytes of the files that it reads."""
        return sum(part.size for part in self.parts)


class Job(BaseModel):
    """All that a worker needs to know; written as JSON into its folder."""

    corpus: Corpus
    """Its paths absolute, as all others here."""
    tasks: list[Task]
    tokenizer_file: str
    eos_token: str
    token_bytes: int
    folder: Path
    """Where everything unfinished lies; nothing in it is data until it is moved to the corpus."""
    workers: int

    @property
    def logs(self) -> Path:
        """datatrove's log folder, with its marks of complete tasks."""
        return self.folder / "logs"

    @property
    def user_error(self) -> Path:
        """Where a worker leaves the message of a UserError, for the process that started it."""
        return self.folder / "user-error.txt"

    def folder_of(self, task: Task) -> Path:
        """Where the shards of a task's source and split are put together."""
        return split_folder(self.folder, task.source, task.split)

    def scratch_of(self, rank: int) -> Path:
        """Where a task keeps its documents before they are shuffled."""
        return self.folder / "scratch" / f"{rank:05d}"

    def progress_of(self, rank: int) -> Path:
        """Where a task says how far it is, JSON."""
        return self.folder / "progress" / f"{rank:05d}.json"

    def is_complete(self, rank: int) -> bool:
        """Whether datatrove has marked a task as complete."""
        return (self.logs / "completions" / f"{rank:05d}").is_file()

    def notes_of(self, rank: int) -> Path:
        """What a complete task says about the text that it read, JSON."""
        return self.folder / "notes" / f"{rank:05d}.json"


def with_absolute_paths(corpus: Corpus) -> Corpus:
    """The corpus as a process sees it that works elsewhere."""
    sources = [
        source
        if source.path is None or is_url(source.path)
        else source.model_copy(update={"path": str(Path(source.path).absolute())})
        for source in corpus.sources
    ]
    return corpus.model_copy(update={"path": str(Path(corpus.path).absolute()), "sources": sources})


def source_folder(folder: Path, source: str) -> Path:
    """A source's folder among the unfinished work: the later folder of its shards, validation inside."""
    return folder / "shards" / source


def split_folder(folder: Path, source: str, split: SplitName) -> Path:
    """Where the shards of one split of a source are put together."""
    return source_folder(folder, source) / ("validation" if split == "validation" else "")


def tasks_of(sources: list[CorpusSource], validation_fraction: float) -> list[Task]:
    """The tasks that make the shards of `sources`; those of a source are about equally long."""
    train, validation = [], []
    for source in sources:
        shards = shards_of(source)
        train += _tasks(source, "train", shards)
        if validation_fraction > 0:
            validation += _tasks(source, "validation", _held_out(shards, validation_fraction))
    return train + validation


def packed_notes(tasks: list[Task], workers: int) -> list[str]:
    """A line for each source that leaves workers idle because a big packed file cannot be shared by them."""
    lines = []
    for source in dict.fromkeys(task.source for task in tasks):
        parts = [task.parts for task in tasks if task.source == source and task.split == "train"]
        packed = [part for share in parts for part in share if part.size > PART_BYTES and is_packed(part.file)]
        if packed and len(parts) < workers:
            largest = max(packed, key=lambda part: part.size)
            lines.append(
                f"note: {source}: {largest.where} is packed, so that it can only be read from its start, by one worker "
                f"of {workers}; unpacked, or in several files, all of them would share it"
            )
    return lines


def _tasks(source: CorpusSource, split: SplitName, shards: list[list[Part]]) -> list[Task]:
    return [
        Task(source=source.name, split=split, shard=shard, shards=len(shards), parts=parts)
        for shard, parts in enumerate(shards)
    ]


def _held_out(shards: list[list[Part]], fraction: float) -> list[list[Part]]:
    """As many shards as make each about as large as one for training, each read from as many parts."""
    parts = [part for shard in shards for part in shard]
    return deal(parts, ceil(len(shards) * fraction)) if parts else [[]]
