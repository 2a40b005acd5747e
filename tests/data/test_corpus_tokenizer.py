"""What becomes of a corpus whose tokenizer is missing, damaged or another."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from small_data import corpus_recipe, write_jsonl
from tokenizers import Tokenizer, processors

from data.manifest import read_manifest
from data.plan import DataPlan
from data.tokenization import tokenize
from data.tokenizer import read_tokenizer, train_tokenizer
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import recipe_from_mapping
from nanotron_recipes.recipe import Recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Generated text and a tokenizer that is trained on it, in `tmp_path / "mine"`."""
    return corpus_recipe(tmp_path / "mine", [{"name": "sums", "reader": "arithmetic", "documents": 60}])


def said(recipe: Recipe) -> str:
    console = Console(width=500, file=io.StringIO(), record=True)
    tokenize(recipe, "mine", workers=1, console=console)
    return console.export_text()


def test_a_tokenizer_of_the_users_is_not_written_over(recipe: Recipe, tmp_path: Path) -> None:
    own = tmp_path / "mine" / "tokenizer" / "tokenizer.json"
    own.parent.mkdir(parents=True)
    own.write_text("precious")
    with pytest.raises(UserError, match="tokenizer: expected a free place for a tokenizer"):
        tokenize(recipe, "mine")
    assert own.read_text() == "precious"


def test_a_tokenizer_that_is_lost_damaged_or_was_interrupted_is_made_again_and_the_shards_stay(
    recipe: Recipe, tmp_path: Path
) -> None:
    tokenize(recipe, "mine", workers=1)
    folder = tmp_path / "mine" / "tokenizer"
    first, shards = read_tokenizer(folder), (tmp_path / "mine" / "sums").stat().st_ino

    def interrupt() -> None:
        first.file.write_text("cut off")
        (tmp_path / "mine" / "tokenizer.settings").write_bytes(b"unfinished\xff")

    for damage in (
        lambda: shutil.rmtree(folder),
        lambda: first.file.write_text("cut off"),
        lambda: (folder / "tokenizer_config.json").unlink(),
        interrupt,
    ):
        damage()
        with pytest.raises(UserError):
            DataPlan.from_recipe(recipe)
        lines = said(recipe)
        assert "training a tokenizer of 300 entries" in lines and "again" not in lines
        assert read_tokenizer(folder) == first and DataPlan.from_recipe(recipe)
        assert (tmp_path / "mine" / "sums").stat().st_ino == shards
    assert "all sources are tokenized already" in said(recipe)


def test_a_run_says_what_makes_a_lost_tokenizer_again(recipe: Recipe, tmp_path: Path) -> None:
    tokenize(recipe, "mine", workers=1)
    (tmp_path / "mine" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json in it; run `nanotron-recipes tokenize RECIPE` first$"):
        DataPlan.from_recipe(recipe)


def test_shards_of_another_tokenizer_are_made_again(recipe: Recipe, tmp_path: Path) -> None:
    tokenize(recipe, "mine", workers=1)
    write_jsonl(tmp_path / "a.jsonl", 30)
    words = corpus_recipe(tmp_path, [{"name": "words", "reader": "jsonl", "path": str(tmp_path / "a.jsonl")}])
    assert words.corpus is not None
    other = train_tokenizer(words.corpus, 300, tmp_path / "mine" / "tokenizer")
    with pytest.raises(UserError, match="were not made with the tokenizer in"):
        DataPlan.from_recipe(recipe)
    assert "sums: to be tokenized again: made with other settings or another tokenizer" in said(recipe)
    (after,) = tokenize(recipe, "mine", workers=1)
    assert after.tokenizer_sha256 == other.sha256 and DataPlan.from_recipe(recipe)


def test_a_given_tokenizer_may_have_fewer_tokens_than_the_model_and_what_it_adds_is_noted(
    recipe: Recipe, tmp_path: Path
) -> None:
    (plain,) = tokenize(recipe, "mine", workers=1)
    given = shutil.copytree(tmp_path / "mine" / "tokenizer", tmp_path / "given")
    tokenizer = Tokenizer.from_file(str(given / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<think> $A", None, [("<think>", 3)])
    tokenizer.save(str(given / "tokenizer.json"))
    mapping = recipe.model_dump(by_alias=True)
    mapping["tokenizer"] = {"tokenizer_name_or_path": str(given)}
    mapping["corpus"]["path"] = str(tmp_path / "other")
    mapping["model"]["model_config"]["vocab_size"] = 320
    with_template = recipe_from_mapping(mapping, source="test").recipe
    lines = said(with_template)
    assert "note: model.model_config.vocab_size: 320: the tokenizer" in lines and "has 300 tokens" in lines
    assert f"note: {given}: the tokenizer puts <think> around a text by itself; no shard has that" in lines
    after = read_manifest(tmp_path / "other" / "sums")
    assert after.train.files[0].sha256 == plain.train.files[0].sha256
    assert DataPlan.from_recipe(with_template)


def test_of_a_tokenizer_that_adds_nothing_to_a_text_nothing_is_noted(recipe: Recipe) -> None:
    assert "note:" not in said(recipe)


def test_a_given_tokenizer_that_is_gone_is_missed_and_not_trained(recipe: Recipe, tmp_path: Path) -> None:
    given = recipe.tokenizer.model_validate({"tokenizer_name_or_path": str(tmp_path / "absent")})
    with pytest.raises(UserError, match=r"absent: no folder with a tokenizer\.json"):
        tokenize(recipe.model_copy(update={"tokenizer": given}), "mine")
