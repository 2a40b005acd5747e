"""What is printed to be called next can be called; models are asked for what they have read."""

import ast
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_pretraining import WORDS, write_recipe

from data.plan import DataPlan
from launch.cli.import_hf import import_folder
from launch.cli.next_line import command, generation_command, loading_command, tool
from launch.evaluate.prompts import ANY_TEXT, one_prompt, sample_prompts
from launch.train.prepare import RunRequest, prepare_run
from model.arithmetic import parameter_shapes
from model.hf_export import export_tensors
from model.model_card import facts_from_recipe, render_card
from nanotron_recipes.loading import load_recipe

NAMES = ["plain", "two words", "it's", 'say "x"', "$HOME", "`id`", "back\\slash", "a\nb", "!x", "ä"]


def words_of(line: str) -> list[str]:
    """What a shell makes of a line, as the words that the program gets."""
    script = f"show() {{ printf '%s\\0' \"$@\"; }}; show {line}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_shell_gives_the_names_back(name: str) -> None:
    assert words_of(command("no-such-tool", "export", name, Path(name))) == ["no-such-tool", "export", name, name]
    python, option, code = words_of(generation_command(Path(name), f"{name}\n"))
    assert (python, option) == (shlex.split(tool("python"))[0], "-c")
    constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert {"text-generation", name, f"{name}\n"} <= set(constants)
    assert repr(name) in words_of(loading_command(Path(name)))[2]


def test_a_common_line_is_easy_to_read() -> None:
    line = generation_command(Path("runs/tiny-1/export"), "Compute 47+86?\n").removeprefix(tool("python"))
    code = "from transformers import pipeline; print(pipeline('text-generation', 'runs/tiny-1/export')"
    assert line == f" -c \"{code}('Compute 47+86?\\n'))\""


def test_a_prompt_is_encoded_as_the_text_was_that_a_model_was_trained_on(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, processors

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert generation_command(tmp_path, "a").endswith("('a'))\"")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert generation_command(tmp_path, "a").endswith("('a', add_special_tokens=False))\"")


def test_a_tool_is_named_as_it_can_be_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(folder))
    assert tool("python") == "python"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("python") is None
    monkeypatch.chdir(folder)
    assert tool("python") == "python" and tool("nanotron-recipes") == "nanotron-recipes"
    monkeypatch.chdir(folder.parent)
    assert tool("python") == f"{folder.name}/python"


def test_a_model_of_the_users_text_goes_on_with_its_held_out_text(
    small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(str(small_file)).recipe
    prompts = sample_prompts(recipe, DataPlan.from_recipe(recipe))
    assert list(prompts) == ["words", "numbers"]
    held_out = (small_file.parent / "text" / "words.jsonl").read_text()
    assert f'{{"text": "{prompts["words"]}' in held_out and prompts["words"].split()[0] in WORDS
    assert prompts["numbers"][0].isdigit()
    assert one_prompt(recipe) == prompts["words"]
    monkeypatch.chdir(tmp_path)
    elsewhere = load_recipe(str(small_file), ["corpus.path=nowhere"]).recipe
    assert one_prompt(elsewhere) == ANY_TEXT


def test_a_model_of_text_that_comes_with_the_code_is_asked_for_that(
    small_file: Path, small_mapping: dict[str, Any], tmp_path: Path
) -> None:
    small_mapping["corpus"]["sources"][0] = {"name": "words", "reader": "python-code"}
    recipe = load_recipe(str(write_recipe(tmp_path / "small.yaml", small_mapping))).recipe
    prompts = sample_prompts(recipe, DataPlan.from_recipe(load_recipe(str(small_file)).recipe))
    assert prompts["words"] == "def __init__(self, " and prompts["numbers"][0].isdigit()
    assert one_prompt(load_recipe("tiny").recipe) == "Compute 47+86?\n"


def test_the_card_shows_its_prompt_as_python() -> None:
    from dataclasses import replace

    facts = facts_from_recipe(load_recipe("tiny").recipe, name="x")
    assert 'tokenizer("The", return_tensors="pt", add_special_tokens=False)' in render_card(facts)
    card = render_card(replace(facts, prompt='a "b"\nc\\'))
    assert r'tokenizer("a \"b\"\nc\\", return_tensors' in card


def test_a_run_begins_from_an_import_as_its_last_line_says(
    small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(str(small_file)).recipe
    shapes = parameter_shapes(recipe, padded=True)
    export_tensors(((name, torch.randn(shape)) for name, shape in shapes.items()), recipe, Path("hf"))
    import_folder(Path("hf"), Path("my import"))
    line = capsys.readouterr().out.splitlines()[-2].removeprefix("next: ")
    _, name, placeholder, *options = shlex.split(line)
    assert (name, placeholder, options[::2]) == ("pretrain", "RECIPE", ["--set"] * 3)
    prepared = prepare_run(RunRequest(load_recipe(str(small_file), options[1::2]), "mine"))
    prepared.lock.release()
    assert (prepared.state, prepared.step) == ("new", 0)
    assert prepared.folder.header().parent.startswith("my import (step 0")
