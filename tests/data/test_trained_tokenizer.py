import json
import time
from pathlib import Path

import pytest
from small_data import write_jsonl

from data.tokenizer import SPECIAL_TOKENS, TokenizerInfo, read_tokenizer, train_tokenizer
from nanotron_recipes.errors import UserError
from nanotron_recipes.schema.data import Corpus

TEXT = "Compute 47+86?\n  <think>\n7+6+0=13; é漢</think>The answer is \\boxed{133}.<|im_end|>"


def corpus_in(folder: Path) -> Corpus:
    write_jsonl(folder / "words.jsonl", 50)
    sources = [
        {"name": "words", "reader": "jsonl", "path": str(folder)},
        {"name": "sums", "reader": "arithmetic", "documents": 100},
    ]
    return Corpus.model_validate({"path": str(folder), "sources": sources})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TokenizerInfo:
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(corpus_in(folder), 400, folder / "tokenizer")


def test_training_twice_gives_the_same_file(trained: TokenizerInfo, tmp_path: Path) -> None:
    again = train_tokenizer(corpus_in(tmp_path), 400, tmp_path / "tokenizer")
    assert again.sha256 == trained.sha256 and read_tokenizer(trained.folder) == trained


def test_special_tokens_come_first_and_digits_stand_alone(trained: TokenizerInfo) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(trained.file))
    assert [tokenizer.id_to_token(i) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    pieces = tokenizer.encode("47+86=133").tokens
    assert pieces == ["4", "7", "+", "8", "6", "=", "1", "3", "3"]
    assert "Compute" in tokenizer.get_vocab()
    assert not [
        token for token in tokenizer.get_vocab() if any(map(str.isdigit, token)) and len(token) > 1 and "|" not in token
    ]


def test_transformers_loads_it_and_agrees(trained: TokenizerInfo) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(trained.folder))
    encoded = loaded(TEXT).input_ids
    assert encoded == Tokenizer.from_file(str(trained.file)).encode(TEXT).ids
    assert loaded.decode(encoded) == TEXT
    assert loaded.decode(encoded, skip_special_tokens=True) == TEXT.replace("<|im_end|>", "")
    assert len(loaded) == 400 and (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|pad|>")


def test_a_small_corpus_still_gives_the_vocabulary_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "aaaa bbbb"}\n' * 3)
    sources = [{"name": "one", "reader": "jsonl", "path": str(tmp_path)}]
    corpus = Corpus.model_validate({"path": str(tmp_path), "sources": sources, "validation_fraction": 0.0})
    assert train_tokenizer(corpus, 500, tmp_path / "tokenizer").vocab_size == 500


def test_a_vocabulary_far_beyond_its_corpus_is_filled_up_in_seconds(tmp_path: Path) -> None:
    """One call a token is quadratic: minutes for these."""
    started = time.perf_counter()
    assert train_tokenizer(corpus_in(tmp_path), 40_000, tmp_path / "tokenizer").vocab_size == 40_000
    assert time.perf_counter() - started < 20


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="265: expected at least 266"):
        train_tokenizer(corpus_in(tmp_path), 265, tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            b'{"eos_token": "</s>"}',
            r"tokenizer_config\.json: eos_token: '</s>': expected one of the tokenizer's tokens",
        ),
        (b'{"eos_token": ["a"]}', r"eos_token: \['a'\]: expected one of"),
        (b'{"eos_token": {"content": {}}}', r"eos_token: \{\}: expected one of"),
        (b"{}", "eos_token: null: expected one of"),
        (b"{", r"tokenizer_config\.json: expected a JSON object with an eos_token"),
        (b"[]", "expected a JSON object"),
        (b"", "expected a JSON object"),
        (b"\xff\xfe\0", "expected a JSON object"),
        (b"[" * 100_000, "expected a JSON object"),
        (None, r"tokenizer_config\.json: cannot be read: No such file"),
    ],
)
def test_a_tokenizer_without_end_of_document_is_refused(
    trained: TokenizerInfo, tmp_path: Path, config: bytes | None, message: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(trained.file.read_bytes())
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_bytes(config)
    with pytest.raises(UserError, match=message):
        read_tokenizer(tmp_path)


def damages(whole: bytes) -> dict[str, bytes]:
    """Ways in which a tokenizer.json can be wrong."""
    content = json.loads(whole)
    return {
        "empty": b"",
        "binary": b"\x93NUMPY\0\xff" * 100,
        "cut off": whole[:-100],
        "a list": b"[]",
        "nothing in it": b"{}",
        "nested": b"[" * 100_000,
        "no vocabulary": json.dumps(content | {"model": {"type": "BPE", "merges": []}}).encode(),
        "a vocabulary that is a list": json.dumps(content | {"model": content["model"] | {"vocab": [1]}}).encode(),
        "ids that are text": json.dumps(content | {"model": content["model"] | {"vocab": {"a": "b"}}}).encode(),
        "merges of other tokens": json.dumps(content | {"model": content["model"] | {"merges": ["x y"]}}).encode(),
        "merges that a prefix does not fit": json.dumps(
            content | {"model": content["model"] | {"continuing_subword_prefix": "#####"}}
        ).encode(),
        "added tokens without ids": json.dumps(content | {"added_tokens": [{"content": "a"}]}).encode(),
    }


def test_a_damaged_tokenizer_is_refused_in_one_line(trained: TokenizerInfo, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes((trained.folder / "tokenizer_config.json").read_bytes())
    for damage, content in damages(trained.file.read_bytes()).items():
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer that the tokenizers library") as caught:
            read_tokenizer(tmp_path)
        assert "\n" not in str(caught.value), damage


def test_folders_in_the_place_of_a_tokenizers_files_are_refused(trained: TokenizerInfo, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match=r"no folder with a tokenizer\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").rmdir()
    (tmp_path / "tokenizer.json").write_bytes(trained.file.read_bytes())
    (tmp_path / "tokenizer_config.json").mkdir()
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read: Is a directory"):
        read_tokenizer(tmp_path)
