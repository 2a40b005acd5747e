"""What vLLM is asked for. A module of this name that draws from each request's seed stands in for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_evaluate import config, refused, task
from tiny_model import write_base, write_chat

from posttraining.evaluate import stage
from posttraining.evaluate.results import read_results
from posttraining.generation import Generator, Prompt
from posttraining.model_folder import load_tokenizer

MODULE = '''
import json
import random
from pathlib import Path
from types import SimpleNamespace

class SamplingParams(SimpleNamespace):
    pass

class TokensPrompt(dict):
    pass

class LLM:
    """Draws letters; ends after four, with the highest eos of the folder, and says more, which nobody reads."""

    def __init__(self, model, dtype):
        files = [Path(model, name) for name in ("generation_config.json", "config.json")]
        named = json.loads(next(file for file in files if file.is_file()).read_text())["eos_token_id"]
        self._end = max(named) if isinstance(named, list) else named

    def generate(self, prompts, parameters, use_tqdm):
        several = parameters if isinstance(parameters, list) else [parameters] * len(prompts)
        return [self._answer(one) for _, one in zip(prompts, several, strict=True)]

    def _answer(self, one):
        draw = random.Random(one.seed)
        tokens = [*(draw.randrange(40, 90) for _ in range(4)), self._end, 41]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)])
'''


@pytest.fixture(autouse=True)
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "vllm.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    yield
    sys.modules.pop("vllm", None)


def ask(folder: Path, prompts: list[Prompt], seed: int = 0) -> list[Any]:
    return Generator(str(folder), "vllm")(prompts, max_new_tokens=8, temperature=1.0, seed=seed)


def test_a_prompt_that_is_asked_several_times_has_several_answers(tmp_path: Path) -> None:
    folder = write_chat(tmp_path / "chat")
    prompts: list[Prompt] = [[{"role": "user", "content": "2+3?"}]] * 5
    answers = ask(folder, prompts)
    assert len({answer.text for answer in answers}) == 5
    assert ask(folder, prompts) == answers
    assert not {answer.text for answer in ask(folder, prompts, seed=1)} & {answer.text for answer in answers}


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_every_eos_that_the_folder_names_ends_an_answer(file: str, tmp_path: Path) -> None:
    folder = write_chat(tmp_path / "chat")
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    other = load_tokenizer(folder).convert_tokens_to_ids("~")
    content = json.loads((folder / file).read_text())
    named = content["eos_token_id"]
    content["eos_token_id"] = [*(named if isinstance(named, list) else [named]), other]
    (folder / file).write_text(json.dumps(content))
    (answer,) = ask(folder, ["2+3"])
    assert (answer.stopped, answer.tokens, len(answer.text)) == (True, 5, 4)


def test_a_base_model_is_asked_in_chats_and_plainly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, bare = (write_base(tmp_path / name, chat_tokens=name == "whole") for name in ("whole", "bare"))
    tasks = [task("plain", mode="plain"), task("think", models=["whole"])]
    stage.run(config(tmp_path, {"whole": str(whole), "bare": str(bare)}, tasks, backend="vllm"))
    assert {name: list(asked) for name, asked in read_results(tmp_path / "scores").summaries.items()} == {
        "whole": ["plain", "think"],
        "bare": ["plain"],
    }
    (tmp_path / "scores").rename(tmp_path / "before")
    capsys.readouterr()
    said = refused(capsys, config(tmp_path, {"bare": str(bare)}, [task("think")], backend="vllm"))
    assert f"backend: 'vllm': the model in {bare} has no token <" in said
