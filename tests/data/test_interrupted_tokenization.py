"""Work that is interrupted when shards are complete already: none of them is made twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_data import corpus_recipe, write_jsonl

from data import corpus_folder, tokenization
from data.tokenization import tokenize
from data.tokenizer import train_tokenizer
from nanotron_recipes.recipe import Recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Two sources, in `tmp_path / "mine"`."""
    write_jsonl(tmp_path / "texts" / "a.jsonl", 30)
    return corpus_recipe(
        tmp_path / "mine",
        [
            {"name": "words", "reader": "jsonl", "path": str(tmp_path / "texts")},
            {"name": "sums", "reader": "arithmetic", "documents": 60},
        ],
    )


def interrupted_at_call(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, but for one of its calls, which is interrupted before it does anything."""
    calls = []

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*arguments)

    return call


def shards(folder: Path) -> dict[str, tuple[int, int]]:
    """By a shard's place below its source's parent, what tells a file from one that was written again."""
    found = {}
    for path in [*folder.rglob("words/**/*.ds"), *folder.rglob("sums/**/*.ds")]:
        source = next(place for place in path.parents if place.name in ("words", "sums"))
        found[path.relative_to(source.parent).as_posix()] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def test_a_call_that_ended_between_two_sources_goes_on_with_the_shards_of_both(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "finish_source", interrupted_at_call(2, tokenization.finish_source))
        with pytest.raises(KeyboardInterrupt):
            tokenize(recipe, "mine", workers=1)
    before = shards(tmp_path / "mine")
    finished: list[str] = []
    real = tokenization.finish_source
    monkeypatch.setattr(tokenization, "finish_source", lambda *given: finished.append(given[1]) or real(*given))
    assert len(tokenize(recipe, "mine", workers=1)) == 2
    assert shards(tmp_path / "mine") == before and len(before) > 3
    assert finished == ["sums"], "a source whose manifest is there is not hashed again"
    assert not list((tmp_path / "mine").glob(".tokenizing-*"))


def test_a_call_that_ended_between_two_renames_only_renames_the_rest(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(corpus_folder, "sync", interrupted_at_call(1, corpus_folder.sync))
        with pytest.raises(KeyboardInterrupt):
            tokenize(recipe, "mine", workers=1)
    before = shards(tmp_path / "mine")
    assert (tmp_path / "mine" / "words").is_dir() and not (tmp_path / "mine" / "sums").exists()
    monkeypatch.setattr(tokenization, "run_job", lambda *given: pytest.fail("nothing is left to be encoded"))
    assert len(tokenize(recipe, "mine", workers=1)) == 2
    assert shards(tmp_path / "mine") == before


def test_what_is_complete_is_kept_where_other_settings_end_the_work_on_the_rest(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recipe.corpus is not None
    given = train_tokenizer(recipe.corpus, 300, tmp_path / "given").folder
    tokenizer = recipe.tokenizer.model_validate({"tokenizer_name_or_path": str(given)})
    recipe = recipe.model_copy(update={"tokenizer": tokenizer})
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "finish_source", interrupted_at_call(2, tokenization.finish_source))
        with pytest.raises(KeyboardInterrupt):
            tokenize(recipe, "mine", workers=1)
    (unfinished,) = (tmp_path / "mine").glob(".tokenizing-*")
    before = {name: file for name, file in shards(unfinished).items() if name.startswith("words/")}
    assert recipe.corpus is not None
    words, sums = recipe.corpus.sources
    corpus = recipe.corpus.model_copy(update={"sources": [words, sums.model_copy(update={"documents": 40})]})
    _, made = tokenize(recipe.model_copy(update={"corpus": corpus}), "mine", workers=1)
    assert made.train.documents == 40
    after = shards(tmp_path / "mine")
    assert before and {name: after[name] for name in before} == before
