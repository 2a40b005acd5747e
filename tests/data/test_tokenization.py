import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from small_data import corpus_recipe, write_jsonl

from data import tokenization
from data.manifest import Manifest, read_manifest
from data.plan import DataPlan
from data.shards import ShardReader
from data.tokenization import tokenize
from data.tokenization_job import Job
from data.tokenizer import read_tokenizer
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml
from nanotron_recipes.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_jsonl(folder / "a.jsonl", 150, seed=1)
    write_jsonl(folder / "b.jsonl", 150, seed=2)
    (folder / "b.jsonl").open("a").write('{"text": "cut off\n')
    return folder


def recipe_of(texts: Path, corpus: Path, **changes: object) -> Recipe:
    sources = [
        {"name": "words", "reader": "jsonl", "path": str(texts)},
        {"name": "sums", "reader": "arithmetic", "documents": 400},
    ]
    return corpus_recipe(corpus, sources, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, list[Manifest], str]:
    """A tokenized corpus: its recipe, folder, manifests, and what was said."""
    folder = tmp_path_factory.mktemp("corpus") / "mine"
    recipe = recipe_of(texts, folder)
    console = Console(record=True, width=500, file=io.StringIO())
    return recipe, folder, tokenize(recipe, "mine", workers=2, console=console), console.export_text()


def contents(folder: Path) -> dict[str, str]:
    """sha256 of everything that lies in the corpus."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".metadata")]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_all_documents_come_back_as_they_were_written(made: tuple[Recipe, Path, list[Manifest], str]) -> None:
    from tokenizers import Tokenizer

    from data.corpora import documents

    recipe, folder, manifests, _ = made
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    assert recipe.corpus is not None
    for source, manifest in zip(recipe.corpus.sources, manifests, strict=True):
        for split_name, split in (("train", manifest.train), ("validation", manifest.validation)):
            reader = ShardReader(folder / source.name, split, manifest.dtype)
            tokens, starts = reader.windows(np.array([0]), reader.num_tokens)
            cuts = np.flatnonzero(starts[0])[1:]
            found = [document.tolist() for document in np.split(tokens[0], cuts)]
            assert {document[-1] for document in found} == {manifest.eos_token_id}
            decoded = sorted(tokenizer.decode(document[:-1]) for document in found)
            expected = sorted(documents(source, recipe.corpus, split_name))  # type: ignore[arg-type]
            assert decoded == expected
            assert split.text_bytes == sum(len(text.encode()) for text in expected)


def test_documents_are_shuffled(made: tuple[Recipe, Path, list[Manifest], str]) -> None:
    from tokenizers import Tokenizer

    from data.corpora import documents

    recipe, folder, manifests, _ = made
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    assert recipe.corpus is not None
    first = next(documents(recipe.corpus.sources[1], recipe.corpus, "train"))
    tokens, _ = ShardReader(folder / "sums", manifests[1].train, "uint16").windows(np.array([0]), 20)
    assert not tokenizer.decode(tokens[0].tolist()).startswith(first[:12])


def test_bad_lines_are_counted_and_named(made: tuple[Recipe, Path, list[Manifest], str]) -> None:
    _, _, manifests, said = made
    assert manifests[0].rejected == {"not a JSON object": 1}
    assert "words: 1 left out: not a JSON object" in said and "b.jsonl:151" in said


def test_the_last_line_says_how_much_was_made(made: tuple[Recipe, Path, list[Manifest], str]) -> None:
    _, _, manifests, said = made
    tokens = sum(manifest.train.tokens + manifest.validation.tokens for manifest in manifests)
    assert f"{tokens:,} tokens in" in said.strip().splitlines()[-1]


def test_nothing_unfinished_is_left_and_the_data_can_be_planned(
    made: tuple[Recipe, Path, list[Manifest], str],
) -> None:
    recipe, folder, _, _ = made
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "sums",
        "tokenizer",
        "tokenizer.settings",
        "words",
    ]
    plan = DataPlan.from_recipe(recipe)
    batch = plan.step(1, dp=1, dp_rank=0, num_micro_batches=1, micro_batch_size=12)
    assert set(batch.sources) == {"words", "sums"}


def test_the_same_corpus_gives_the_same_bytes_with_any_number_of_workers(
    made: tuple[Recipe, Path, list[Manifest], str], texts: Path, tmp_path: Path
) -> None:
    tokenize(recipe_of(texts, tmp_path / "mine"), "mine", workers=1)
    again = contents(tmp_path / "mine")
    first = contents(made[1])
    for name in again:
        if name.endswith("manifest.json"):
            one, two = (read_manifest((folder / name).parent) for folder in (made[1], tmp_path / "mine"))
            assert one.fingerprint == two.fingerprint and one.train == two.train
        else:
            assert first[name] == again[name]


def test_a_second_call_encodes_and_writes_nothing(made: tuple[Recipe, Path, list[Manifest], str]) -> None:
    """Not even the folder in which unfinished work lies."""
    recipe, folder, manifests, _ = made
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    assert tokenize(recipe, "mine") == manifests
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def start_tokenizing(recipe: Recipe, folder: Path) -> "subprocess.Popen[bytes]":
    """Tokenizes in a process of its own, as a user does."""
    file = folder / "mine.yaml"
    file.write_text(dump_yaml(recipe))
    code = (
        "import sys; from data.tokenization import tokenize; from nanotron_recipes.loading import load_recipe;"
        "tokenize(load_recipe(sys.argv[1]).recipe, 'mine', workers=2)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, str(file)], env=environment)


def test_a_killed_tokenization_leaves_no_data_and_goes_on(
    made: tuple[Recipe, Path, list[Manifest], str], texts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    recipe = recipe_of(texts, folder)
    process = start_tokenizing(recipe, tmp_path)
    deadline = time.monotonic() + 60
    while not list(folder.glob(".tokenizing-*/logs/completions/*")):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(folder.glob("*/manifest.json")), "nothing is data before all of it is there"
    with pytest.raises(UserError, match="run `nanotron-recipes tokenize"):
        DataPlan.from_recipe(recipe)
    (unfinished,) = folder.glob(".tokenizing-*")
    _wait_until_workers_are_gone(unfinished)
    before = complete_shards(unfinished)
    assert before
    manifests = tokenize(recipe, "mine", workers=1)
    after = {path: written(folder / path) for path in before}
    assert after == before, "what was complete is not made again"
    assert [manifest.fingerprint for manifest in manifests] == [manifest.fingerprint for manifest in made[2]]
    assert not list(folder.glob(".tokenizing-*"))


def complete_shards(unfinished: Path) -> dict[str, tuple[int, int]]:
    """By place in the corpus, the files of the tasks that have been marked as complete."""
    job = Job.model_validate_json((unfinished / "job.json").read_text())
    tasks = [task for rank, task in enumerate(job.tasks) if job.is_complete(rank)]
    files = [path for task in tasks for path in job.folder_of(task).glob(f"{task.shard:05d}_*.ds*")]
    named = {path.relative_to(unfinished / "shards").as_posix(): written(path) for path in files}
    return {name: mark for name, mark in named.items() if not name.endswith(".metadata")}


def written(path: Path) -> tuple[int, int]:
    """What tells a file from one that was written again."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def _wait_until_workers_are_gone(unfinished: Path) -> None:
    """The worker's process group dies with its parent, not only when its task is over."""
    deadline = time.monotonic() + 5
    while _processes_naming(str(unfinished)):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.02)


def _processes_naming(text: str) -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in command:
            found.append(command)
    return found


def test_changed_settings_make_new_shards_of_that_source_alone(texts: Path, tmp_path: Path) -> None:
    from data.tokenizer import train_tokenizer

    first = recipe_of(texts, tmp_path / "mine")
    assert first.corpus is not None
    train_tokenizer(first.corpus, 300, tmp_path / "given")

    def with_documents(count: int) -> Recipe:
        assert first.corpus is not None
        words, sums = first.corpus.sources
        corpus = first.corpus.model_copy(update={"sources": [words, sums.model_copy(update={"documents": count})]})
        tokenizer = first.tokenizer.model_copy(
            update={"tokenizer_name_or_path": str(tmp_path / "given"), "train": None}
        )
        return first.model_copy(update={"corpus": corpus, "tokenizer": tokenizer})

    before = tokenize(with_documents(100), "mine", workers=1)
    words = (tmp_path / "mine" / "words" / "manifest.json").stat().st_mtime_ns
    after = tokenize(with_documents(120), "mine", workers=1)
    assert (before[1].train.documents, after[1].train.documents) == (100, 120) and before[0] == after[0]
    assert (tmp_path / "mine" / "words" / "manifest.json").stat().st_mtime_ns == words
    assert not list((tmp_path / "mine").glob(".tokenizing-*"))


def test_a_full_disk_is_said_in_one_line_and_the_work_goes_on_when_there_is_room(
    texts: Path, tmp_path: Path, mount: Callable[[str], Path]
) -> None:
    disk = mount("80k")
    recipe = corpus_recipe(disk / "c", [{"name": "words", "reader": "jsonl", "path": str(texts)}])
    with pytest.raises(UserError, match=rf"^{disk}/c[^ ]*: No space left on device; make room there and call again$"):
        tokenize(recipe, "mine", workers=1)
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    elsewhere = corpus_recipe(tmp_path / "c", [{"name": "words", "reader": "jsonl", "path": str(texts)}])
    (there,), (here,) = (tokenize(each, "mine", workers=1) for each in (recipe, elsewhere))
    assert there.fingerprint == here.fingerprint


def test_two_calls_at_once_are_refused(texts: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "mine").mkdir()
    with (tmp_path / "mine" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is tokenizing"):
            tokenize(recipe_of(texts, tmp_path / "mine"), "mine")


def test_a_folder_with_other_content_is_not_replaced(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "words").mkdir(parents=True)
    (tmp_path / "mine" / "words" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"words: expected a free place for shards"):
        tokenize(recipe_of(texts, tmp_path / "mine"), "mine")
    assert (tmp_path / "mine" / "words" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("changes", "content", "message"),
    [
        ({"text_key": "txt"}, '{"text": "hello"}\n', r"text_key: 'txt': .* \(keys: text\); did you mean text\?"),
        ({}, "", r"\.jsonl: no document in there"),
        ({}, "not json\n", r"\.jsonl: no document in there \(1 × not a JSON object\)"),
        ({}, '{"text": [1]}\n', r"\.jsonl: no document in there \(1 × a list under the text_key, not text\)"),
        ({}, json.dumps({f"key {i:03d}": 1 for i in range(900)}), r"\(keys: key 000, .*, key 009, …\)$"),
    ],
)
def test_a_corpus_without_text_is_refused_before_any_work(
    tmp_path: Path, changes: dict[str, str], content: str, message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    source = {"name": "words", "reader": "jsonl", "path": str(tmp_path / "a.jsonl"), **changes}
    with pytest.raises(UserError, match=message):
        tokenize(corpus_recipe(tmp_path / "mine", [source]), "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"], "nothing is left of it"


def test_a_failure_leaves_what_was_there_and_no_lock(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    source = {"name": "words", "reader": "jsonl", "path": str(texts), "text_key": "txt"}
    with pytest.raises(UserError, match="text_key"):
        tokenize(corpus_recipe(tmp_path / "mine", [source]), "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_more_tokens_than_the_model_has_are_refused(texts: Path, tmp_path: Path) -> None:
    recipe = recipe_of(texts, tmp_path / "mine")
    tokenizer = recipe.tokenizer.model_validate({"train": {"vocab_size": 301}})
    with pytest.raises(UserError, match=r"vocab_size: 300: tokenizer\.train\.vocab_size is 301, expected at most as"):
        tokenize(recipe.model_copy(update={"tokenizer": tokenizer}), "mine")


def test_a_tokenizer_folder_that_is_none_is_refused(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: no folder with a tokenizer\.json"):
        read_tokenizer(tmp_path / "absent")


def test_workers_are_given_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    jobs: list[Job] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenization, "run_job", lambda job, *_: jobs.append(job) or sys.exit("seen"))
    with pytest.raises(SystemExit, match="seen"):
        tokenize(corpus_recipe(Path("mine"), [{"name": "words", "reader": "jsonl", "path": "a.jsonl"}]), "mine")
    (job,) = jobs
    paths = [job.folder, Path(job.tokenizer_file), Path(job.corpus.path), Path(job.corpus.sources[0].path or "")]
    assert [path.relative_to(tmp_path).parts[0] for path in paths] == ["mine", "mine", "mine", "a.jsonl"]
