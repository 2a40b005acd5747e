from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from hypothesis import given
from hypothesis import strategies as st
from small_data import write_jsonl
from tokenizers import Tokenizer

from data import encoding
from data.corpora import documents
from data.encoding import DocumentEncoder, pieces_of
from data.tokenizer import END_OF_TEXT, TokenizerInfo, train_tokenizer
from nanotron_recipes.schema.data import Corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("texts")
    write_jsonl(folder / "a.jsonl", 60)
    sources = [{"name": "words", "reader": "jsonl", "path": str(folder)}]
    return Corpus.model_validate({"path": str(folder), "sources": sources})


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> TokenizerInfo:
    return train_tokenizer(corpus, 400, Path(corpus.path, "tokenizer"))


def encode(folder: Path, file: Path, texts: list[str], token_bytes: int = 2) -> list[list[int]]:
    """The documents of the shard that is made of these texts, sorted."""
    encoder = DocumentEncoder(
        str(folder), str(file), scratch=str(folder / "x"), eos_token=END_OF_TEXT, token_bytes=token_bytes, seed=1
    )
    encoder.run((Document(text=text, id="") for text in texts), rank=0, world_size=1)
    (shard,) = folder.glob("*.ds")
    ends = np.fromfile(f"{shard}.index", dtype="<u8").astype(np.int64)
    return sorted(part.tolist() for part in np.split(np.fromfile(shard, dtype=f"<u{token_bytes}"), ends[:-1]))


@given(st.text(alphabet="ab 1.\n", max_size=60), st.integers(1, 20))
def test_pieces_are_the_text_and_none_is_longer_than_asked(text: str, limit: int) -> None:
    pieces = list(pieces_of(text, limit))
    assert "".join(pieces) == text and max(map(len, pieces)) <= limit and all(pieces[:-1])


def test_a_long_document_has_the_same_tokens_piece_by_piece(
    corpus: Corpus, tokenizer: TokenizerInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 500)
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 200)
    texts = list(documents(corpus.sources[0], corpus, "train"))
    texts = [" ".join(texts[:20]), *texts[20:]]
    assert len(list(pieces_of(texts[0], 200))) > 10
    expected = Tokenizer.from_file(str(tokenizer.file)).encode_batch(texts)
    assert encode(tmp_path, tokenizer.file, texts) == sorted([*e.ids, tokenizer.eos_token_id] for e in expected)


def test_what_the_tokenizers_file_says_of_length_and_padding_does_not_touch_documents(
    corpus: Corpus, tokenizer: TokenizerInfo, tmp_path: Path
) -> None:
    changed = Tokenizer.from_file(str(tokenizer.file))
    changed.enable_truncation(5)
    changed.enable_padding(length=300)
    changed.save(str(tmp_path / "changed.json"))
    texts = list(documents(corpus.sources[0], corpus, "train"))
    made = encode(tmp_path / "changed", tmp_path / "changed.json", texts, token_bytes=4)
    assert made == encode(tmp_path / "plain", tokenizer.file, texts)
    assert len(list(chain(*made))) > 300 and {document[-1] for document in made} == {tokenizer.eos_token_id}
