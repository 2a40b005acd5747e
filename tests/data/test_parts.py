"""Big files are cut into parts, of which every document is read exactly once, in the order of the file."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import corpus_recipe, write_jsonl

from data import parts as parts_module
from data.corpora import documents, shards_of
from data.parts import deal
from data.rejected import Rejected
from data.text_part import Part
from data.tokenization import tokenize
from data.tokenization_job import packed_notes, tasks_of
from data.user_text import read_texts
from nanotron_recipes.schema.data import Corpus, CorpusSource


def source_of(path: Path, reader: str = "jsonl", **changes: object) -> CorpusSource:
    return CorpusSource.model_validate({"name": "mine", "reader": reader, "path": str(path), **changes})


def read(parts: list[Part], reader: str = "jsonl", rejected: Rejected | None = None) -> list[str]:
    return list(read_texts(reader, parts, "text", rejected or Rejected()))


@pytest.fixture(scope="module")
def odd_lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty lines, letters of several bytes, a byte order mark, carriage returns, no end of line at the end."""
    path = tmp_path_factory.mktemp("odd") / "a.jsonl"
    lines = [
        "",
        *(json.dumps({"text": "ä" * (number % 7 + 1) + str(number)}, ensure_ascii=False) for number in range(9)),
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())
    return path


@given(st.lists(st.integers(0, 400), max_size=8))
def test_every_line_is_in_exactly_one_part_wherever_a_file_is_cut(odd_lines: Path, cuts: list[int]) -> None:
    size = odd_lines.stat().st_size
    bounds = [0, *sorted(min(cut, size) for cut in cuts), size]
    parts = [
        Part(folder=str(odd_lines.parent), file="a.jsonl", size=end - first, first=first, end=end)
        for first, end in pairwise(bounds)
    ]
    whole = read([Part(folder=str(odd_lines.parent), file="a.jsonl", size=size)])
    assert len(whole) == 9 and read(parts) == whole


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 12))
def test_parts_are_dealt_in_their_order_and_evenly(sizes: list[int], shards: int) -> None:
    parts = [Part(folder="f", file=str(number), size=size) for number, size in enumerate(sizes)]
    shares = deal(parts, shards)
    assert [part for share in shares for part in share] == parts and len(shares) <= shards and all(shares)
    if len(parts) > shards:
        assert max(sum(part.size for part in share) for share in shares) <= sum(sizes) / shards + 2 * max(sizes)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "PART_BYTES", 4096)


@pytest.mark.usefixtures("small_parts")
def test_a_big_jsonl_file_is_as_many_shards_as_it_has_parts(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "big.jsonl", 300)
    write_jsonl(tmp_path / "small.jsonl", 3)
    source = source_of(tmp_path)
    shards = shards_of(source)
    sizes = [part.size for share in shards for part in share if part.file == "big.jsonl"]
    assert len(sizes) > 10 and max(sizes) - min(sizes) <= 1 and sum(sizes) == (tmp_path / "big.jsonl").stat().st_size
    corpus = Corpus.model_validate({"path": "unused", "sources": [source.model_dump()]})
    for split in ("train", "validation"):
        whole = list(documents(source, corpus, split))
        assert [text for parts in shards for text in documents(source, corpus, split, parts=parts)] == whole
    assert len(shards_of(source.model_copy(update={"documents": 5}))) == 1


@pytest.mark.usefixtures("small_parts")
def test_a_big_parquet_file_is_cut_between_row_groups(tmp_path: Path) -> None:
    rows = [f"text {number} " * 20 for number in range(1000)]
    rows[777] = " "
    pq.write_table(
        pa.table({"text": rows, "n": range(1000)}), tmp_path / "a.parquet", row_group_size=30, compression="none"
    )
    shards = shards_of(source_of(tmp_path, "parquet"))
    assert len(shards) > 10 and shards[0][0].first == 0 and shards[-1][-1].end == 34
    rejected = Rejected()
    found = [text for parts in shards for text in read(parts, "parquet", rejected)]
    assert found == rows[:777] + rows[778:]
    assert rejected.examples == {"empty text": [f"{tmp_path / 'a.parquet'}:778"]}
    assert sum(part.size for parts in shards for part in parts) == pytest.approx(
        (tmp_path / "a.parquet").stat().st_size, 0.01
    )


@pytest.mark.usefixtures("small_parts")
def test_a_bad_line_of_a_later_part_is_named_by_its_byte(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", 300)
    content = (tmp_path / "a.jsonl").read_bytes()
    place = content.index(b"\n", len(content) // 2) + 1
    (tmp_path / "a.jsonl").write_bytes(content[:place] + b"broken\n" + content[place:])
    rejected = Rejected()
    for parts in shards_of(source_of(tmp_path)):
        read(parts, rejected=rejected)
    assert rejected.counts == {"not a JSON object": 1}
    assert rejected.examples["not a JSON object"] == [f"{tmp_path / 'a.jsonl'}: byte {place}"]


@pytest.mark.usefixtures("small_parts")
def test_a_packed_file_that_leaves_workers_idle_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.tokenization_job.PART_BYTES", 4096)
    write_jsonl(tmp_path / "a.jsonl", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.jsonl").unlink()
    tasks = tasks_of([source_of(tmp_path)], 0.05)
    assert [len(task.parts) for task in tasks] == [1, 1]
    (line,) = packed_notes(tasks, workers=2)
    assert line.startswith(
        f"note: mine: {tmp_path / 'a.jsonl.gz'} is packed, so that it can only be read from its start"
    )
    assert packed_notes(tasks, workers=1) == []


@pytest.mark.usefixtures("small_parts")
def test_held_out_text_is_as_many_shards_as_keep_them_as_large_as_those_for_training(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", 600)
    tasks = tasks_of([source_of(tmp_path)], 0.25)
    train, held_out = ([task for task in tasks if task.split == split] for split in ("train", "validation"))
    assert len(held_out) == -(-len(train) // 4) > 1
    assert [part for task in held_out for part in task.parts] == [part for task in train for part in task.parts]
    assert [task.split for task in tasks_of([source_of(tmp_path)], 0.0)] == ["train"] * len(train)


@pytest.mark.usefixtures("small_parts")
def test_one_big_file_gives_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "big.jsonl", 400)
    source = {"name": "words", "reader": "jsonl", "path": str(tmp_path / "big.jsonl")}
    made = []
    for workers in (1, 3):
        (manifest,) = tokenize(corpus_recipe(tmp_path / f"by {workers}", [source]), "mine", workers=workers)
        made.append((manifest.train, manifest.validation, manifest.rejected))
    assert made[0] == made[1] and len(made[0][0].files) > 10
    assert made[0][0].documents + made[0][1].documents == 400
