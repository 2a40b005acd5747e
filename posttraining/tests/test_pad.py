"""A tokenizer that pads with its end of turn, or with nothing: no training is begun, and answers end all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ANSWER, QUESTION, chat_rows, overrides, write_rows
from test_prefer import pairs
from tiny_model import write_chat

from posttraining import grpo, prefer, sft
from posttraining.errors import Mistake
from posttraining.generation import Generator
from posttraining.model_folder import load_tokenizer

END = "<|im_end|>"


def pad_with(folder: Path, token: str | None) -> Path:
    """The folder, whose tokenizer then pads with `token`."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": token}))
    assert load_tokenizer(folder).pad_token == token
    return folder


@pytest.mark.parametrize("pad", [None, END])
@pytest.mark.parametrize("stage", ["prefer", "grpo"])
def test_a_foreign_model_without_a_pad_of_its_own_is_refused_before_it_is_trained(
    stage: str, pad: str | None, tmp_path: Path
) -> None:
    folder = pad_with(write_chat(tmp_path / "chat"), pad)
    rows = pairs(4) if stage == "prefer" else [{"prompt": QUESTION, "answer": "5"}] * 4
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    keys = {"model": str(folder), "output_dir": str(tmp_path / "out"), "max_steps": 1}
    data = {"path": file, "held_out_path": file} if stage == "prefer" else {"path": file}
    run = {"prefer": prefer.run, "grpo": grpo.run}[stage]
    with pytest.raises(Mistake, match=rf"{folder}: pad_token: '<.im_end.>': is its eos_token too; expected another"):
        run("tiny", overrides({**keys, "data": data}), "weights from a partner")
    assert not list(tmp_path.glob("*out*"))


def test_a_recipe_that_pads_with_the_eos_is_refused(base: Path, tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "rows.jsonl", chat_rows()))
    keys = {"model": str(base), "output_dir": str(tmp_path / "out"), "data": {"path": file}, "pad_token": END}
    with pytest.raises(Mistake, match=r"pad_token: '<.im_end.>': is its eos_token too"):
        sft.run("tiny", overrides(keys))


@pytest.mark.parametrize("pad", [None, END])
def test_its_answers_in_a_batch_end_with_their_turns(pad: str | None, taught: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in taught.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    generator = Generator(str(pad_with(folder, pad)), "transformers")
    prompts = [[{"role": "user", "content": text}] for text in (QUESTION, "a longer question than that")]
    answers = generator(prompts, max_new_tokens=60, temperature=0, seed=0)
    assert (answers[0].text, answers[0].stopped) == (ANSWER, True)
