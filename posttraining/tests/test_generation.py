"""Answers of a model: the same in every run, ended by the end-of-turn token alone, whatever the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ANSWER, QUESTION
from tiny_model import write_chat

from posttraining.errors import Mistake
from posttraining.generation import Generator, Prompt, generate, has_vllm
from posttraining.model_folder import load_model, load_tokenizer

PROMPTS: list[Prompt] = [[{"role": "user", "content": text}] for text in ("2+3?", "a longer question", "?")]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = write_chat(tmp_path_factory.mktemp("chat") / "chat")
    return load_model(folder), load_tokenizer(folder)


def test_sampling_depends_on_the_seed_alone(chat: tuple[Any, Any]) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(*chat, PROMPTS, seed=3, **arguments)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator is left alone"
    torch.manual_seed(2)
    assert generate(*chat, PROMPTS, seed=3, **arguments) == first
    assert generate(*chat, PROMPTS, seed=4, **arguments) != first
    repeated = generate(*chat, [PROMPTS[0]] * 4, seed=3, batch_size=2, **arguments)
    assert len({answer.text for answer in repeated}) > 2, "batches do not repeat each other"


def test_greedy_answers_do_not_depend_on_the_batch(chat: tuple[Any, Any]) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0, "seed": 0}
    together = generate(*chat, PROMPTS, **arguments)
    assert [generate(*chat, [prompt], **arguments)[0] for prompt in PROMPTS] == together
    assert all(answer.tokens == 12 for answer in together if not answer.stopped)


def test_text_is_answered_as_it_stands_and_a_conversation_through_the_template(taught: Path) -> None:
    model, tokenizer = load_model(taught), load_tokenizer(taught)
    turns = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    counted: list[int] = []
    answers = generate(
        model, tokenizer, [turns, text], max_new_tokens=60, temperature=0, seed=0, progress=counted.append
    )
    assert [(answer.text, answer.stopped) for answer in answers] == [(ANSWER, True)] * 2
    assert answers[0].tokens == len(tokenizer.encode(ANSWER)) + 1
    assert counted == [2]


def test_the_model_is_left_in_the_mode_it_was_in(chat: tuple[Any, Any]) -> None:
    model, tokenizer = chat
    model.train()
    generate(model, tokenizer, PROMPTS[:1], max_new_tokens=1, temperature=0, seed=0)
    assert model.training
    model.eval()


@pytest.mark.skipif(has_vllm(), reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_named(taught: Path) -> None:
    with pytest.raises(Mistake, match="vLLM is not installed"):
        Generator(str(taught), "vllm")
    assert Generator(str(taught), "auto").backend == "transformers"
