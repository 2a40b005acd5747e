"""The sample that tokenizers are trained and compared on: of text that is trained on, from all over a source."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_data import write_jsonl

from data import text_sample
from data.corpora import documents
from data.text_sample import sample_text
from nanotron_recipes.schema.data import Corpus


def corpus_of(folder: Path, **source: Any) -> Corpus:
    return Corpus.model_validate({"path": str(folder), "sources": [{"name": "words", **source}]})


def test_few_of_many_shards_are_opened_from_all_over_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(70):
        write_jsonl(tmp_path / "texts" / f"{number:02d}.jsonl", 3, seed=number)
    corpus = corpus_of(tmp_path, reader="jsonl", path=str(tmp_path / "texts"))
    opened: list[int] = []

    def noted(*given: Any, shard: int, **more: Any) -> Iterator[str]:
        opened.append(shard)
        return documents(*given, shard=shard, **more)

    monkeypatch.setattr(text_sample, "documents", noted)
    assert list(sample_text(corpus.sources[0], corpus, 500))
    assert opened == list(range(0, 70, 3))


def test_a_sample_is_as_many_bytes_as_asked_for_in_any_script(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "漢字漢字漢字漢字漢字"}\n' * 50, encoding="utf-8")
    corpus = corpus_of(tmp_path, reader="jsonl", path=str(tmp_path / "a.jsonl"))
    texts = list(sample_text(corpus.sources[0], corpus, 300))
    assert sum(len(text.encode()) for text in texts) == 300


def test_a_long_document_does_not_stand_for_its_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{"long " * 100_000}"}}\n' * 4)
    corpus = corpus_of(tmp_path, reader="jsonl", path=str(tmp_path / "a.jsonl"))
    assert [len(text) for text in sample_text(corpus.sources[0], corpus, 120_000)] == [50_000] * 3


@pytest.mark.parametrize("reader", ["python-code", "python-docs"])
def test_modules_beyond_the_corpus_are_in_no_sample(reader: str, tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, reader=reader, documents=5)
    texts = list(sample_text(corpus.sources[0], corpus, 1_000_000))
    in_corpus = [text[:50_000] for text in documents(corpus.sources[0], corpus, "train")]
    assert texts == in_corpus and 0 < len(texts) <= 5
