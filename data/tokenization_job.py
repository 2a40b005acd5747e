"""What `tokenize` hands to its worker process, and where both keep unfinished work."""

from pathlib import Path

from pydantic import BaseModel

from data.corpora import SplitName, num_shards
from nanotron_recipes.schema.data import Corpus, CorpusSource


class Task(BaseModel):
    """One shard of one split of one source."""

    source: str
    split: SplitName
    shard: int
    shards: int


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

    def notes_of(self, rank: int) -> Path:
        """What a complete task says about the text that it read, JSON."""
        return self.folder / "notes" / f"{rank:05d}.json"


def with_absolute_paths(corpus: Corpus) -> Corpus:
    """The corpus as a process sees it that works elsewhere."""
    sources = [
        source if source.path is None else source.model_copy(update={"path": str(Path(source.path).absolute())})
        for source in corpus.sources
    ]
    return corpus.model_copy(update={"path": str(Path(corpus.path).absolute()), "sources": sources})


def source_folder(folder: Path, source: str) -> Path:
    """A source's folder among the unfinished work: the later folder of its shards, validation inside."""
    return folder / "shards" / source


def split_folder(folder: Path, source: str, split: SplitName) -> Path:
    """Where the shards of one split of a source are put together."""
    return source_folder(folder, source) / ("validation" if split == "validation" else "")


def tasks_of(sources: list[CorpusSource], with_validation: bool) -> list[Task]:
    """The tasks that make the shards of `sources`, the longest ones first."""
    tasks = [
        Task(source=source.name, split="train", shard=shard, shards=shards)
        for source in sources
        for shards in [num_shards(source)]
        for shard in range(shards)
    ]
    if with_validation:
        tasks += [Task(source=source.name, split="validation", shard=0, shards=1) for source in sources]
    return tasks
