"""A run that begins from the weights of another reads tokens that those know."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launch.train.prepare import RunRequest, prepare_run
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from parallel.checkpoint_files import Manifest, write_manifest

Begin = Callable[[int], tuple[str, ...]]
FROM_WEIGHTS = ("checkpoints.resume_checkpoint_path=imported", "checkpoints.load_lr_scheduler=false")


def with_renamed_tokens(source: Path, folder: Path, count: int) -> None:
    """A copy of a tokenizer's folder in which so many ids, from the last one down, stand for other tokens."""
    shutil.copytree(source, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    renamed = sorted(vocabulary, key=vocabulary.__getitem__)[len(vocabulary) - count :]
    content["model"]["vocab"] = {(f"~{token}" if token in renamed else token): i for token, i in vocabulary.items()}
    content["model"]["merges"] = [pair for pair in merges if not {*pair, "".join(pair)} & {*renamed}]
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.fixture
def begin(small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """Begin a run from an imported model, in whose tokenizer so many tokens are others; the notes."""
    monkeypatch.chdir(tmp_path)

    def call(renamed: int) -> tuple[str, ...]:
        tokenizer = small_file.parent / "corpus" / "tokenizer"
        with_renamed_tokens(tokenizer, tmp_path / "theirs", renamed)
        write_manifest(tmp_path / "imported", Manifest(0, "", {}, ()))
        recipe = yaml.safe_load(small_file.read_text())
        recipe |= {"corpus": None, "data_stages": [], "tokenizer": {"tokenizer_name_or_path": str(tmp_path / "theirs")}}
        (tmp_path / "imported" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        prepared = prepare_run(RunRequest(load_recipe(str(small_file), FROM_WEIGHTS), "mine"))
        prepared.lock.release()
        return prepared.notes

    return call


def test_a_model_of_the_same_tokens_is_gone_on_with_in_silence(begin: Begin) -> None:
    assert begin(0) == ()


def test_a_few_tokens_that_got_another_use_are_told(begin: Begin) -> None:
    (note,) = begin(9)
    assert "imported: 9 of 320 token ids stand for other tokens in " in note


def test_a_model_of_another_tokenizer_is_refused_before_anything_is_written(begin: Begin, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"imported: 250 of 320 token ids .* with tokenizer\.tokenizer_name_or_path: "):
        begin(250)
    assert not (tmp_path / "runs").exists()


def test_a_run_from_another_runs_weights_knows_that_runs_own_tokenizer(
    begin: Begin, small_file: Path, tmp_path: Path
) -> None:
    """A tokenizer that is trained on a corpus is another one when its text changes: the run's copy is asked."""
    begin(0)
    of_run = tmp_path / "runs" / "mine" / "checkpoints" / "8"
    shutil.copytree(tmp_path / "imported", of_run)
    shutil.rmtree(tmp_path / "runs" / "mine" / "tokenizer")
    with_renamed_tokens(tmp_path / "theirs", tmp_path / "runs" / "mine" / "tokenizer", 300)
    overrides = (f"checkpoints.resume_checkpoint_path={of_run}", FROM_WEIGHTS[1])
    with pytest.raises(UserError, match="runs/mine/tokenizer, which its model was trained with"):
        prepare_run(RunRequest(load_recipe(str(small_file), overrides), "next"))
