"""The process that `tokenize` starts: datatrove's executor for each shard of all sources that are to be made.

A task is one shard of one split of one source; datatrove's completion marks let an interrupted job go on. The process
lives no longer than the one that started it: when its standard input closes, it kills its whole process group.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

from datatrove.data import Document, DocumentsPipeline
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from data.corpora import documents
from data.encoding import DocumentEncoder
from data.order import derive_key
from data.rejected import Rejected
from data.tokenization_job import DISK_IS_FULL, Job
from data.tokenization_progress import TaskProgress
from nanotron_recipes.errors import UserError
from nanotron_recipes.files import write_atomic


class TokenizeShard(PipelineStep):
    """Reads, encodes and shuffles the shard that belongs to the task's rank, and notes what was read."""

    name = "Shard of a source"
    type = "🔢 - TOKENIZER"

    def __init__(self, job_file: str) -> None:
        super().__init__()
        self.job_file = job_file

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Makes the shard of task `rank`."""
        job = Job.model_validate_json(Path(self.job_file).read_text(encoding="utf-8"))
        task = job.tasks[rank]
        source = next(source for source in job.corpus.sources if source.name == task.source)
        rejected = Rejected()
        texts = documents(
            source,
            job.corpus,
            task.split,
            shard=task.shard,
            shards=task.shards,
            parts=task.parts,
            rejected=rejected,
        )
        reading = _Reading(texts)
        progress = TaskProgress(job, rank, rejected)
        writer = DocumentEncoder(
            str(job.folder_of(task)),
            job.tokenizer_file,
            scratch=str(job.scratch_of(rank)),
            eos_token=job.eos_token,
            token_bytes=job.token_bytes,
            seed=derive_key(job.corpus.seed, task.source, task.split, task.shard),
            made=progress.add,
        )
        try:
            writer.run(reading.documents(), rank=task.shard, world_size=task.shards)
        except UserError as error:
            write_atomic(job.user_error, str(error))
            raise
        progress.note()
        notes: dict[str, Any] = {"documents": reading.count, "text_bytes": reading.text_bytes}
        notes |= {"rejected": dict(rejected.counts), "examples": rejected.examples}
        write_atomic(job.notes_of(rank), json.dumps(notes) + "\n")


class _Reading:
    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self.count = 0
        self.text_bytes = 0

    def documents(self) -> Iterator[Document]:
        for text in self._texts:
            self.text_bytes += len(text.encode("utf-8", errors="replace"))
            yield Document(text=text, id=str(self.count))
            self.count += 1


def _die_with_parent() -> None:
    # Not through sys.stdin: a process forked meanwhile would inherit its lock and hang when it closes it.
    os.read(0, 1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main(job_file: str, node: str = "0", nodes: str = "1") -> NoReturn:
    """Runs every task of the job that is not complete yet, or this node's share of them.

    To be called from `python -c`, because the processes of the pool must be able to import this module by its name.
    Where the disk is full no file can say so: the exit status is the number of the error.
    """
    code = 1
    try:
        _run_share(job_file, int(node), int(nodes))
        code = 0
    except BrokenProcessPool:
        print("a worker was killed, as happens where memory is short: fewer --workers need less", file=sys.stderr)
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            code = error.errno
        else:
            traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    if code:
        # datatrove's managers outlive a worker that was killed, and Python 3.13 waits for them at its end: they have a
        # pipe of multiprocessing's resource tracker.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(os.getpgid(0), signal.SIGTERM)
    sys.exit(code)


def _run_share(job_file: str, node: int, nodes: int) -> None:
    job = Job.model_validate_json(Path(job_file).read_text(encoding="utf-8"))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tasks = range(node, len(job.tasks), nodes)
    workers = min(job.workers, len(tasks))
    if workers > 1:
        _run_in_pool(job_file, tasks, workers)
    else:
        for rank in tasks:
            run_task(job_file, rank)


def _run_in_pool(job_file: str, tasks: Sequence[int], workers: int) -> None:
    # Not in datatrove's own pool: that waits for ever for a process that the system has killed.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "data.user_text"])
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        for task in as_completed([pool.submit(run_task, job_file, rank) for rank in tasks]):
            task.result()
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    pool.shutdown()


def run_task(job_file: str, rank: int) -> None:
    """Runs one task of the job unless it is complete, and marks it as complete."""
    job = Job.model_validate_json(Path(job_file).read_text(encoding="utf-8"))
    LocalPipelineExecutor(
        [TokenizeShard(job_file)],
        tasks=len(job.tasks),
        workers=1,
        logging_dir=str(job.logs),
        local_tasks=1,
        local_rank_offset=rank,
    ).run()
