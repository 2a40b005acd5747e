"""Answers of a model to prompts: transformers everywhere, vLLM where it is asked for."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttraining.chat import apply_template, end_tokens
from posttraining.errors import mistake
from posttraining.model_folder import (
    check_model_folder,
    load_generation_config,
    load_model,
    load_tokenizer,
    read_config,
)

Backend = Literal["auto", "transformers", "vllm"]
Prompt = str | list[dict[str, Any]]
"""Text as it stands, or a conversation that the chat template turns into the prompt of an answer."""


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    """Without the end-of-turn token; thoughts included."""
    tokens: int
    """Generated, the end of the turn included."""
    stopped: bool
    """Whether it ended at an end-of-turn token (else at the limit)."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 128,
    template: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """One answer a prompt, in their order, with transformers.

    `temperature` 0 is greedy; otherwise tokens are drawn from the whole distribution with a generator that depends on
    `seed` and the batch, so that a list of prompts has the same answers in every run. `template`: further arguments of
    the chat template (enable_thinking, tools). `progress` is called with the number of answers of each batch.
    """
    import torch
    from transformers import GenerationConfig

    stops = end_tokens(model.generation_config, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        top_p=1.0 if temperature > 0 else None,
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id,
    )
    was_training, answers = model.training, []
    model.eval()
    try:
        with torch.inference_mode(), torch.random.fork_rng(enabled=temperature > 0):
            for first in range(0, len(prompts), batch_size):
                torch.manual_seed(_derived(seed, first))
                batch = _encode(tokenizer, prompts[first : first + batch_size], template).to(model.device)
                tokens = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]
                answers += [_answer(tokenizer, row, stops) for row in tokens.tolist()]
                if progress:
                    progress(len(tokens))
    finally:
        model.train(was_training)
    return answers


def has_vllm() -> bool:
    """Whether vLLM can be imported."""
    return importlib.util.find_spec("vllm") is not None


class Generator:
    """Answers of the model in a folder with the backend that the settings name; the model is loaded once."""

    def __init__(self, folder: str, backend: Backend = "auto", dtype: str = "auto", batch_size: int = 128) -> None:
        """`backend` auto is vLLM where it is installed and there is a GPU, else transformers. Raises Mistake."""
        from torch import cuda

        self._folder = check_model_folder(folder)
        if backend == "vllm" and not has_vllm():
            raise mistake(None, "backend", backend, "vLLM is not installed: pip install 'posttraining[vllm]'")
        self.backend = (
            "vllm"
            if backend == "vllm" or (backend == "auto" and has_vllm() and cuda.is_available())
            else ("transformers")
        )
        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(folder)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # nothing after an answer's first eos is read
        if self.backend == "vllm":
            from vllm import LLM

            self.model = LLM(model=folder, dtype=dtype)
            self._config = load_generation_config(self._folder)
        else:
            self.model = load_model(folder, dtype).to("cuda" if cuda.is_available() else "cpu")

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        template: dict[str, Any] | None = None,
    ) -> list[Answer]:
        """One answer a prompt, in their order; see `generate`."""
        if self.backend == "transformers":
            return generate(
                self.model,
                self.tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                batch_size=self.batch_size,
                template=template,
            )
        return self._ask_vllm(prompts, max_new_tokens, temperature, seed, template)

    def _ask_vllm(
        self, prompts: Sequence[Prompt], limit: int, temperature: float, seed: int, template: dict[str, Any] | None
    ) -> list[Answer]:
        from vllm import SamplingParams, TokensPrompt

        stops = end_tokens(self._config, self.tokenizer)
        encoded = [_ids(self.tokenizer, prompt, template) for prompt in prompts]
        self._check_known(encoded)
        # A seed is of one request: with the same for all, a prompt that is asked twice has the same answer twice.
        parameters = [
            SamplingParams(
                temperature=temperature,
                max_tokens=limit,
                seed=_derived(seed, place),
                stop_token_ids=sorted(stops),
            )
            for place in range(len(prompts))
        ]
        outputs = self.model.generate(
            [TokensPrompt(prompt_token_ids=tokens) for tokens in encoded], parameters, use_tqdm=True
        )
        return [_answer(self.tokenizer, list(output.outputs[0].token_ids), stops) for output in outputs]

    def _check_known(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise Mistake where a prompt has a token that was given to the tokenizer alone: vLLM adds no embeddings."""
        size = read_config(self._folder).get("vocab_size")
        highest = max((token for tokens in prompts for token in tokens), default=0)
        if isinstance(size, int) and highest >= size:
            name = self.tokenizer.convert_ids_to_tokens(highest)
            expected = f"the model in {self._folder} has no token {name}, which vLLM cannot add; expected transformers"
            raise mistake(None, "backend", self.backend, expected)


def _ids(tokenizer: Any, prompt: Prompt, template: dict[str, Any] | None) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return list(apply_template(tokenizer, prompt, template, None, add_generation_prompt=True)["input_ids"])


def _encode(tokenizer: Any, prompts: Sequence[Prompt], template: dict[str, Any] | None) -> Any:
    """The prompts as tensors `input_ids` and `attention_mask`, int64 [batch, longest], padded on the left."""
    rows = [_ids(tokenizer, prompt, template) for prompt in prompts]
    return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")


def _answer(tokenizer: Any, tokens: list[int], stops: set[int]) -> Answer:
    end = next((place for place, token in enumerate(tokens) if token in stops), None)
    if end is None:
        return Answer(_text(tokenizer, tokens), len(tokens), stopped=False)
    return Answer(_text(tokenizer, tokens[:end]), end + 1, stopped=True)


def _text(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _derived(seed: int, index: int) -> int:
    """A seed for one batch or request, unrelated to those of others."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:4], "big")
