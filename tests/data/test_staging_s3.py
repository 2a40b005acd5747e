"""Staging from a real S3 server over HTTP: what fails is ridden out, or is one message and nothing half-written."""

import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from s3_store import BUCKET, Faults, Store, faulty_proxy, store
from small_data import random_documents, recipe_with, write_source

from data.plan import DataPlan
from data.s3 import Patience, S3Prefix
from data.s5cmd import S5cmdPrefix
from data.staging import Staging, StagingFailed, plan_staging, stage
from data.transfer import TransferFailed, Watch
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe

__all__ = ["store"]
QUICK = Patience(attempts=4, first_seconds=0.01)


@pytest.fixture
def words(store: Store, tmp_path: Path) -> Path:
    """A source of 3 shards, which is in the store, too."""
    write_source(tmp_path / "words", [random_documents(i, 400, 50) for i in range(3)])
    store.upload(tmp_path / "words", f"{tmp_path.name}/words")
    return tmp_path / "words"


def recipe_of(words: Path, endpoint: str, **staging: object) -> Recipe:
    return recipe_with(
        [(1, {f"s3://{BUCKET}/{words.parent.name}/words": 1.0})],
        sequence_length=8,
        global_batch_size=640,
        data_staging={"path": str(words.parent / "nvme"), "endpoint_url": endpoint, "workers": 2, **staging},
    )


def quickly(staging: Staging) -> Staging:
    """The same, with less patience."""
    for source in staging.sources:
        origin = source.origin
        prefix = origin._prefix if isinstance(origin, S5cmdPrefix) else origin
        assert isinstance(prefix, S3Prefix)
        prefix.patience = QUICK
    return staging


def stage_all(recipe: Recipe, watch: Watch | None = None) -> Path:
    staging = quickly(plan_staging(recipe))
    stage(recipe, staging, watch or Watch())
    return staging.sources[0].folder


def assert_whole(copies: Path, words: Path) -> None:
    for name in ("00000.ds", "00001.ds", "00002.ds", "validation/00000.ds"):
        for file in (name, f"{name}.index"):
            assert (copies / file).read_bytes() == (words / file).read_bytes()
    assert not list(copies.rglob(".*"))


def test_a_run_reads_shards_of_a_store_from_copies(store: Store, words: Path) -> None:
    recipe = recipe_of(words, store.url)
    copies = stage_all(recipe)
    assert copies == words.parent / "nvme/s3" / BUCKET / words.parent.name / "words"
    assert_whole(copies, words)
    plan = DataPlan.from_recipe(recipe)
    batch = plan.step(60, dp=1, dp_rank=0, num_micro_batches=1, micro_batch_size=640)
    here = DataPlan.from_recipe(recipe_with([(1, {str(words): 1.0})], sequence_length=8, global_batch_size=640))
    other = here.step(60, dp=1, dp_rank=0, num_micro_batches=1, micro_batch_size=640)
    assert (batch.micro_batches[0].tokens == other.micro_batches[0].tokens).all()


def test_a_start_with_copies_asks_the_store_nothing(store: Store, words: Path) -> None:
    stage_all(recipe_of(words, store.url))
    DataPlan.from_recipe(recipe_of(words, "http://127.0.0.1:9"))


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_store_that_fails_or_is_throttled_is_asked_again(store: Store, words: Path, status: int) -> None:
    notes: list[str] = []
    faults = Faults(errors=3, status=status)
    with faulty_proxy(store, faults) as endpoint:
        copies = stage_all(recipe_of(words, endpoint), Watch(note=notes.append))
    assert_whole(copies, words)
    assert len(notes) == 3 and all("trying again" in note for note in notes)


def test_a_connection_that_ends_in_the_middle_of_an_object_goes_on_there(store: Store, words: Path) -> None:
    size = (words / "00001.ds").stat().st_size
    faults = Faults(of="00001.ds", cuts=[1000, 500, 0])
    told: list[int] = []
    with faulty_proxy(store, faults) as endpoint:
        staging = quickly(plan_staging(recipe_of(words, endpoint)))
        stage(recipe_of(words, endpoint), staging, Watch(advance=told.append))
    assert_whole(staging.sources[0].folder, words)
    asked = [wanted for path, wanted in faults.seen if path.endswith("00001.ds")]
    assert asked[0] is None and len(asked) == 4
    first, second, third = (int(str(wanted).removeprefix("bytes=").rstrip("-")) for wanted in asked[1:])
    assert 0 <= first <= second <= third < size
    assert sum(told) == staging.bytes_to_stage


def test_a_store_that_only_fails_ends_with_one_message_and_nothing_under_a_final_name(
    store: Store, words: Path
) -> None:
    message = r"s3://.*/words/00001\.ds: given up after 4 attempts: .*\(SlowDown\)"
    with (
        faulty_proxy(store, Faults(of="00001.ds", errors=1000)) as endpoint,
        pytest.raises(StagingFailed, match=message),
    ):
        stage_all(recipe_of(words, endpoint))
    copies = words.parent / "nvme/s3" / BUCKET / words.parent.name / "words"
    assert not (copies / "00001.ds").exists() and not (copies / "manifest.json").exists()
    for path in copies.rglob("0*.ds"):
        assert path.read_bytes() == (words / path.relative_to(copies)).read_bytes()
    assert_whole(stage_all(recipe_of(words, store.url)), words)


def test_a_store_that_cannot_be_reached_is_one_message() -> None:
    prefix = S3Prefix("bucket", "words", endpoint_url="http://127.0.0.1:9", patience=replace(QUICK, attempts=2))
    with pytest.raises(TransferFailed, match=r"s3://bucket/words/manifest\.json: given up after 2 attempts: Could not"):
        prefix.read("manifest.json", Watch())


def test_a_missing_source_object_or_key_is_not_asked_for_again(store: Store, words: Path) -> None:
    with pytest.raises(
        UserError, match=rf"s3://{BUCKET}/none/words: no manifest\.json in it; run `nanotron-recipes tok"
    ):
        plan_staging(
            recipe_with(
                [(1, {f"s3://{BUCKET}/none/words": 1.0})],
                data_staging={"path": str(words.parent / "nvme"), "endpoint_url": store.url},
            )
        )
    store.client.delete_object(Bucket=BUCKET, Key=f"{words.parent.name}/words/00002.ds.index")
    with pytest.raises(UserError, match=r"words/00002\.ds\.index: .*\(NoSuchKey\)"):
        stage_all(recipe_of(words, store.url))


def test_a_truncated_and_a_changed_object_are_named(store: Store, words: Path) -> None:
    content = bytearray((words / "00002.ds").read_bytes())
    for body, message in (
        (content[:-2], "bytes, and its manifest says"),
        (content[::-1], r"not what its manifest says"),
    ):
        store.put(f"{words.parent.name}/words/00002.ds", bytes(body))
        with pytest.raises(UserError, match=rf"words/00002\.ds: .*{message}"):
            stage_all(recipe_of(words, store.url))
        assert not list((words.parent / "nvme").rglob("00002.ds"))


S5CMD = """#!{python}
import json, os, sys, urllib.request
arguments = sys.argv[1:]
calls = {calls!r}
with open(calls, "a") as file:
    file.write(json.dumps(arguments) + "\\n")
failures = {failures!r}
if os.path.exists(failures):
    left = int(open(failures).read())
    if left:
        open(failures, "w").write(str(left - 1))
        sys.exit("ERROR cp: RequestError: send request failed")
endpoint = arguments[arguments.index("--endpoint-url") + 1]
source, target = arguments[-2:]
try:
    body = urllib.request.urlopen(endpoint + "/" + source.removeprefix("s3://")).read()
except urllib.error.HTTPError as error:
    sys.exit("ERROR cp: NoSuchKey: status code: %d" % error.code)
open(target, "wb").write(body)
"""


@pytest.fixture
def s5cmd(tmp_path: Path) -> Path:
    """A program that is called like s5cmd; it notes its calls and fails as often as `failures` says."""
    program = tmp_path / "s5cmd"
    program.write_text(
        S5CMD.format(python=sys.executable, calls=str(tmp_path / "calls"), failures=str(tmp_path / "failures"))
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_s5cmd_moves_objects_where_it_is_installed(
    store: Store, words: Path, s5cmd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{s5cmd.parent}{os.pathsep}{os.environ['PATH']}")
    (words.parent / "failures").write_text("2")
    notes: list[str] = []
    told: list[int] = []
    recipe = recipe_of(words, store.url, s5cmd_concurrency=7)
    staging = quickly(plan_staging(recipe))
    stage(recipe, staging, Watch(advance=told.append, note=notes.append))
    assert_whole(staging.sources[0].folder, words)
    calls = [json.loads(line) for line in (words.parent / "calls").read_text().splitlines()]
    assert len(notes) >= 2, "transfers that run at once may take the same failure off the list"
    assert len(calls) == 8 + len(notes) and "send request failed; trying again" in notes[0]
    assert calls[0][:-2] == ["--endpoint-url", store.url, "--log", "error", "cp", "--raw", "--concurrency", "7"]
    assert sum(told) == staging.bytes_to_stage


def test_what_s5cmd_brings_is_hashed_and_what_it_cannot_find_is_named(store: Store, words: Path, s5cmd: Path) -> None:
    recipe = recipe_of(words, store.url, s5cmd_path=str(s5cmd))
    changed = (words / "00002.ds").read_bytes()[::-1]
    store.put(f"{words.parent.name}/words/00002.ds", changed)
    with pytest.raises(UserError, match=r"words/00002\.ds: its content is not what its manifest says"):
        stage_all(recipe)
    store.client.delete_object(Bucket=BUCKET, Key=f"{words.parent.name}/words/00002.ds")
    with pytest.raises(UserError, match=r"words/00002\.ds: ERROR cp: NoSuchKey"):
        stage_all(recipe)
    assert not list((words.parent / "nvme").rglob("00002.ds"))
    with pytest.raises(UserError, match=r"data_staging\.s5cmd_path: /no/s5cmd: no such program"):
        plan_staging(recipe_of(words, store.url, s5cmd_path="/no/s5cmd"))
