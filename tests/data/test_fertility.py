import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from small_data import corpus_recipe, write_jsonl

from data.corpora import documents
from data.fertility import Fertility, distinct_names, fertility, sample
from data.tokenization import tokenize
from data.tokenizer import TokenizerInfo, train_tokenizer
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml
from nanotron_recipes.recipe import Recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("texts")
    write_jsonl(folder / "a.jsonl", 200)
    sources = [
        {"name": "words", "reader": "jsonl", "path": str(folder)},
        {"name": "sums", "reader": "arithmetic", "documents": 100},
    ]
    return corpus_recipe(folder / "corpus", sources)


@pytest.fixture(scope="module")
def tokenizers(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> list[TokenizerInfo]:
    folder = tmp_path_factory.mktemp("tokenizers")
    assert recipe.corpus is not None
    return [train_tokenizer(recipe.corpus, size, folder / f"of-{size}") for size in (270, 400)]


def test_tokens_words_and_bytes_are_those_of_the_text(tokenizers: list[TokenizerInfo]) -> None:
    texts = ["zz zz\n zz", "ää 1"]
    found = fertility(texts, tokenizers[0])
    assert found == Fertility(documents=2, text_bytes=15, words=5, tokens=15), (
        "each byte is a token where none is learnt"
    )
    assert (found.tokens_per_word, found.bytes_per_token) == (3.0, 1.0)
    assert found + found == Fertility(4, 30, 10, 30)


def test_a_larger_vocabulary_makes_fewer_tokens_of_its_own_text(
    recipe: Recipe, tokenizers: list[TokenizerInfo]
) -> None:
    assert recipe.corpus is not None
    texts = sample(recipe.corpus.sources[0], recipe.corpus, 10_000)
    small, large = (fertility(texts, info) for info in tokenizers)
    assert 10_000 <= sum(map(len, texts)) < 11_000 and (small.words, small.text_bytes) == (
        large.words,
        large.text_bytes,
    )
    assert large.tokens_per_word < small.tokens_per_word and large.bytes_per_token > small.bytes_per_token


def test_a_sample_is_training_text_and_all_of_it_where_there_is_little(recipe: Recipe) -> None:
    assert recipe.corpus is not None
    for source in recipe.corpus.sources:
        whole = sample(source, recipe.corpus, 1 << 30)
        assert sorted(whole) == sorted(documents(source, recipe.corpus, "train"))


def test_tokenizers_are_told_apart_by_as_little_of_their_path_as_needed() -> None:
    assert distinct_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert distinct_names([Path("/a/x"), Path("/b/x"), Path("y")]) == ["a/x", "b/x", "y"]


def run(*arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", "from launch.cli.main import main; main()", "data", "fertility", *arguments]
    return subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=60)


def test_the_command_compares_every_source_and_says_what_to_call_next(
    recipe: Recipe, tokenizers: list[TokenizerInfo], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(dump_yaml(recipe))
    options = [part for info in tokenizers for part in ("--tokenizer", str(info.folder))]
    done = run("mine.yaml", *options, where=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert [row[:2] for row in rows] == [[s, t] for s in ("words", "sums", "all") for t in ("of-270", "of-400")]
    *_, best, following = done.stdout.strip().splitlines()
    assert best == "of-400 has the most bytes per token over all sources"
    assert shlex.split(following)[2:] == [
        *("tokenize", "mine.yaml", "--set", f"tokenizer.tokenizer_name_or_path={tokenizers[1].folder}"),
        *("--set", "tokenizer.train=null", "--set", "model.model_config.vocab_size=400"),
    ]


def test_a_corpus_that_keeps_its_own_tokenizer_is_not_tokenized_again(recipe: Recipe, tmp_path: Path) -> None:
    assert recipe.corpus is not None
    tokenize(recipe, "mine")
    (tmp_path / "mine.yaml").write_text(dump_yaml(recipe))
    done = run("mine.yaml", "--tokenizer", f"{recipe.corpus.path}/tokenizer", where=tmp_path)
    assert shlex.split(done.stdout.strip().splitlines()[-1])[2:] == ["pretrain", "mine.yaml"], done.stderr


def test_a_recipe_that_has_no_tokenizer_so_far_is_given_one(
    recipe: Recipe, tokenizers: list[TokenizerInfo], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(dump_yaml(recipe))
    without = ["--set", "tokenizer.train=null"]
    done = run("mine.yaml", "--tokenizer", str(tokenizers[0].folder), *without, where=tmp_path)
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout.strip().splitlines()[-1])[2:] == [
        *("tokenize", "mine.yaml", *without),
        *("--set", f"tokenizer.tokenizer_name_or_path={tokenizers[0].folder}"),
        *("--set", "model.model_config.vocab_size=270"),
    ]


def test_a_tokenizer_that_is_none_and_a_missing_one_are_mistakes(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(dump_yaml(recipe))
    done = run("mine.yaml", "--tokenizer", "absent", where=tmp_path)
    assert done.returncode == 2 and "absent: no folder with a tokenizer.json" in done.stderr
    assert run("mine.yaml", where=tmp_path).returncode == 2


def test_a_source_without_text_is_named(recipe: Recipe, tmp_path: Path) -> None:
    assert recipe.corpus is not None
    (tmp_path / "a.jsonl").write_text('{"content": "words"}\n')
    source = recipe.corpus.sources[0].model_copy(update={"path": str(tmp_path)})
    with pytest.raises(UserError, match=r"corpus\.sources words: text_key: 'text': .* \(keys: content\)"):
        sample(source, recipe.corpus, 100)
