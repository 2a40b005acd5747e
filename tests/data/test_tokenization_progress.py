"""How far a tokenization is, and how long it will take."""

from pathlib import Path

import pytest

from data.rejected import Rejected
from data.text_part import Part
from data.tokenization_job import Job, Task
from data.tokenization_progress import Rates, State, TaskProgress, forget_incomplete, state_of
from nanotron_recipes.schema.data import Corpus


def job_in(folder: Path) -> Job:
    """Two tasks for training, the second of three times the size, and one that reads both for what is held out."""
    parts = [Part(folder="f", file="a", size=size) for size in (1000, 3000)]
    tasks = [Task(source="a", split="train", shard=i, shards=2, parts=[part]) for i, part in enumerate(parts)]
    tasks.append(Task(source="a", split="validation", shard=0, shards=1, parts=parts))
    corpus = Corpus.model_validate(
        {"path": "c", "sources": [{"name": "a", "reader": "jsonl", "path": "f"}], "validation_fraction": 0.25}
    )
    return Job(corpus=corpus, tasks=tasks, tokenizer_file="t", eos_token="e", token_bytes=2, folder=folder, workers=1)


def note(job: Job, rank: int, read: int, tokens: int) -> None:
    progress = TaskProgress(job, rank, Rejected(bytes_read=read))
    progress.add(tokens)


def complete(job: Job, rank: int) -> None:
    (job.logs / "completions").mkdir(parents=True, exist_ok=True)
    (job.logs / "completions" / f"{rank:05d}").touch()


def test_work_is_counted_by_what_is_encoded_also_inside_a_task(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    assert state_of(job) == State(0.0, 0)
    note(job, 0, 500, 70)
    assert state_of(job) == State(pytest.approx(500 / 5000), 70)
    complete(job, 0)
    note(job, 2, 2000, 10)
    assert state_of(job) == State(pytest.approx((1000 + 500) / 5000), 80)


def test_what_an_interrupted_task_noted_is_forgotten(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    note(job, 0, 1000, 5)
    complete(job, 0)
    note(job, 1, 3000, 7)
    forget_incomplete(job)
    assert state_of(job).tokens == 5


def test_speed_and_time_left_are_those_of_the_last_minute() -> None:
    rates = Rates()
    assert rates.line(0.0, State(0.0, 0)) == "0 tokens"
    assert rates.line(10.0, State(0.1, 4_000_000)) == "4.00M tokens, 400K tokens/s, 0:01:30 left"
    for second in range(20, 201, 10):
        said = rates.line(float(second), State(0.1 + (second - 10) * 0.001, 4_000_000 + (second - 10) * 1000))
    assert said == "4.19M tokens, 1.00K tokens/s, 0:11:50 left"
