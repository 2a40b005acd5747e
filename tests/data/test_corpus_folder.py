"""What becomes of a corpus whose settings or files change, and of what others have put there."""

import io
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from small_data import corpus_recipe, write_jsonl

from data import tokenization
from data.corpus_folder import remove_unfinished, unfinished_folder
from data.finish import finish_source
from data.manifest import write_manifest
from data.text_files import inputs_of
from data.tokenization import look_at_text, tokenize
from data.tokenization_job import Job, source_folder
from data.tokenization_process import run_job
from data.tokenizer import read_tokenizer, train_tokenizer
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.data import CorpusSource


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    recipe = corpus_recipe(folder / "unused", [{"name": "sums", "reader": "arithmetic", "documents": 50}])
    assert recipe.corpus is not None
    return train_tokenizer(recipe.corpus, 300, folder / "tokenizer").folder


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Path) -> Recipe:
    """Text from files and text that is generated, with a given tokenizer, in `tmp_path / "mine"`."""
    write_jsonl(tmp_path / "texts" / "a.jsonl", 30)
    sources = [
        {"name": "words", "reader": "jsonl", "path": str(tmp_path / "texts")},
        {"name": "sums", "reader": "arithmetic", "documents": 60},
    ]
    made = corpus_recipe(tmp_path / "mine", sources)
    given = made.tokenizer.model_validate({"tokenizer_name_or_path": str(tokenizer)})
    return made.model_copy(update={"tokenizer": given})


def said(recipe: Recipe) -> str:
    console = Console(width=500, file=io.StringIO(), record=True)
    tokenize(recipe, "mine", workers=1, console=console)
    return console.export_text()


def with_documents(recipe: Recipe, count: int) -> Recipe:
    assert recipe.corpus is not None
    words, sums = recipe.corpus.sources
    sources = [words.model_copy(update={"documents": count}), sums]
    return recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"sources": sources})})


def test_changed_files_are_noticed_and_tokenized_again(recipe: Recipe, tmp_path: Path) -> None:
    before = tokenize(recipe, "mine", workers=1)
    assert look_at_text(recipe).outdated == [] and before[0].inputs is not None and before[1].inputs is None
    write_jsonl(tmp_path / "texts" / "b.jsonl", 10, seed=2)
    (line,) = look_at_text(recipe).outdated
    assert line.startswith("words: to be tokenized again: its files have changed since (1 file of ")
    assert " bytes then, 2 files of " in line
    assert line in said(recipe)
    after = tokenize(recipe, "mine", workers=1)
    assert after[0].train.documents > before[0].train.documents and after[1] == before[1]


def test_files_with_another_time_are_read_again_and_the_same_text_stays_the_same_data(
    recipe: Recipe, tmp_path: Path
) -> None:
    before = tokenize(recipe, "mine", workers=1)
    os.utime(tmp_path / "texts" / "a.jsonl", ns=(1, 1))
    assert len(look_at_text(recipe).outdated) == 1
    after = tokenize(recipe, "mine", workers=1)
    assert after[0].inputs != before[0].inputs and after[0].fingerprint == before[0].fingerprint


def test_a_trained_tokenizer_follows_its_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts" / "a.jsonl", 30)
    sources = [
        {"name": "words", "reader": "jsonl", "path": str(tmp_path / "texts")},
        {"name": "sums", "reader": "arithmetic", "documents": 60},
    ]
    recipe = corpus_recipe(tmp_path / "mine", sources)
    before = tokenize(recipe, "mine", workers=1)
    (tmp_path / "texts" / "a.jsonl").write_text('{"text": "entirely other words than before"}\n' * 5)
    after = tokenize(recipe, "mine", workers=1)
    assert len({manifest.tokenizer_sha256 for manifest in after}) == 1
    assert after[0].tokenizer_sha256 != before[0].tokenizer_sha256


def test_shards_outlive_the_text_that_they_were_made_of(recipe: Recipe, tmp_path: Path) -> None:
    before = tokenize(recipe, "mine", workers=1)
    (tmp_path / "texts" / "a.jsonl").unlink()
    for reason in ("no file matches **/*.jsonl or", "no such file or folder"):
        line = next(line for line in said(recipe).splitlines() if line.startswith("note: corpus.sources words: path:"))
        assert reason in line and line.endswith("; the shards made before are used")
        assert tokenize(recipe, "mine") == before and look_at_text(recipe).outdated == []
        if (tmp_path / "texts").is_dir():
            (tmp_path / "texts").rmdir()
    with pytest.raises(UserError, match=r"corpus\.sources words: path: .*: no such file or folder$"):
        tokenize(with_documents(recipe, 5), "mine")


def test_a_link_to_nothing_among_the_files_hides_no_changed_text(recipe: Recipe, tmp_path: Path) -> None:
    before = tokenize(recipe, "mine", workers=1)
    link = tmp_path / "texts" / "gone.jsonl"
    link.symlink_to(tmp_path / "absent.jsonl")
    for _ in range(2):
        for look in (partial(tokenize, recipe, "mine"), partial(look_at_text, recipe)):
            with pytest.raises(UserError, match=r"words: .*texts/gone\.jsonl: a link to a file that is not there$"):
                look()
        write_jsonl(tmp_path / "texts" / "a.jsonl", 10, seed=2)
    link.unlink()
    after = tokenize(recipe, "mine", workers=1)
    assert after[0].fingerprint != before[0].fingerprint and look_at_text(recipe).outdated == []
    (tmp_path / "texts" / "a.jsonl").unlink()
    link.symlink_to(tmp_path / "absent.jsonl")
    assert "gone.jsonl: a link to a file that is not there; the shards made before are used" in said(recipe)


def test_files_that_cannot_be_looked_at_hide_no_changed_text(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize(recipe, "mine", workers=1)
    write_jsonl(tmp_path / "texts" / "closed" / "b.jsonl", 5, seed=2)
    real = Path.is_file

    def refused(path: Path) -> bool:
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(UserError, match=r"words: path: .*: cannot be looked through: Permission denied$"):
        tokenize(recipe, "mine")


def test_inputs_are_told_by_name_size_and_time(tmp_path: Path) -> None:
    source = CorpusSource.model_validate({"name": "words", "reader": "text", "path": str(tmp_path)})
    (tmp_path / "a.txt").write_text("one")
    first = inputs_of(source)
    assert first is not None and (first.files, first.bytes) == (1, 3) and inputs_of(source) == first
    os.utime(tmp_path / "a.txt", ns=(5, 5))
    second = inputs_of(source)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, inputs_of(source)}) == 3
    (tmp_path / "c.json").write_text("not read")
    assert str(inputs_of(source)) == "1 file of 3 bytes"


def test_a_file_of_the_users_is_never_removed_with_the_shards_that_it_lies_among(
    recipe: Recipe, tmp_path: Path
) -> None:
    tokenize(recipe, "mine", workers=1)
    thesis = tmp_path / "mine" / "words" / "validation" / "thesis.txt"
    thesis.write_text("precious")
    assert tokenize(recipe, "mine"), "nothing is to be replaced"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mine" / "words").rglob("*")}
    with pytest.raises(
        UserError, match=r"words: expected a free place .* did not make validation/thesis\.txt in there"
    ):
        tokenize(with_documents(recipe, 5), "mine", workers=1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mine" / "words").rglob("*")} == before
    thesis.unlink()
    assert tokenize(with_documents(recipe, 5), "mine", workers=1)[0].train.documents <= 5
    assert not list((tmp_path / "mine").glob(".tokenizing-*"))


def test_shards_whose_manifest_does_not_say_who_made_them_are_the_same_data_and_can_be_replaced(
    recipe: Recipe, tmp_path: Path
) -> None:
    (words, _) = tokenize(recipe, "mine", workers=1)
    silent = words.model_copy(update={"made_by": None})
    write_manifest(tmp_path / "mine" / "words", silent)
    assert words.made_by == "tokenize" and silent.fingerprint == words.fingerprint
    assert tokenize(with_documents(recipe, 5), "mine", workers=1)[0].train.documents <= 5


def test_many_files_in_the_way_are_counted(recipe: Recipe, tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / "mine" / "words" / f"{number}").mkdir(parents=True)
    with pytest.raises(UserError, match=r"did not make 0, 1, 2 and 6 more in there; move that away first"):
        tokenize(recipe, "mine")


def test_a_file_in_the_place_of_a_source_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "words").write_text("precious")
    with pytest.raises(UserError, match="words: expected a free place for shards; a file is in the way"):
        tokenize(recipe, "mine")


def test_only_our_own_unfinished_work_is_removed(recipe: Recipe, tmp_path: Path) -> None:
    for name in (".tokenizing-notes", ".tokenizing-0123456789ab", ".tokenizing-ba9876543210"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    assert recipe.corpus is not None
    remove_unfinished(recipe.corpus, keep=unfinished_folder(recipe.corpus, "ba9876543210"))
    left = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert left == [".tokenizing-ba9876543210", ".tokenizing-notes"]


def cut_off(job: Job) -> None:
    (shard,) = source_folder(job.folder, "sums").glob("00000*.ds")
    shard.write_bytes(shard.read_bytes()[:-6])


def lose_an_index(job: Job) -> None:
    next(source_folder(job.folder, "sums").glob("*.ds.index")).unlink()


def lose_a_shard(job: Job) -> None:
    next(source_folder(job.folder, "sums").glob("*.ds")).unlink()


def spoil_a_note(job: Job) -> None:
    job.notes_of(0).write_bytes(b"\xff{")


def test_damaged_unfinished_work_is_named_instead_of_becoming_data(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = corpus_recipe(tmp_path / "mine", [{"name": "sums", "reader": "arithmetic", "documents": 60}])
    given = recipe.tokenizer.model_validate({"tokenizer_name_or_path": str(tokenizer)})
    tried = []

    def run_and_damage(job: Job, console: Console, starter: object) -> None:
        run_job(job, console)
        for number, damage in enumerate((cut_off, lose_an_index, lose_a_shard, spoil_a_note)):
            copy = job.model_copy(update={"folder": tmp_path / f"copy {number}"})
            shutil.copytree(job.folder, copy.folder)
            damage(copy)
            with pytest.raises(UserError, match=rf"unfinished work is damaged: .*; remove {copy.folder} and"):
                finish_source(copy, "sums", read_tokenizer(tokenizer), "settings", None, console)
            tried.append(damage)

    monkeypatch.setattr(tokenization, "run_job", run_and_damage)
    (manifest,) = tokenize(recipe.model_copy(update={"tokenizer": given}), "mine", workers=1)
    assert len(tried) == 4 and manifest.train.documents == 60
