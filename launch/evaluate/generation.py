"""Text from an exported folder, with plain transformers: what a user of the export would get."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.hf_folder import load_with_transformers
from nanotron_recipes.errors import UserError

if TYPE_CHECKING:
    import torch

_SMALL = 10_000_000


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model wrote after it, special tokens left out."""

    kind: str
    prompt: str
    text: str


class Generator:
    """An exported model with its tokenizer, loaded once (in the dtype it is stored in)."""

    def __init__(self, export_dir: Path, device: str = "cpu") -> None:
        from transformers import AutoTokenizer

        for name in ("config.json", "tokenizer.json"):
            if not (export_dir / name).is_file():
                raise UserError(f"{export_dir}: no {name} here; expected an exported folder with its tokenizer")
        self._model: Any = load_with_transformers(export_dir, "auto").to(device)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(export_dir)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def continue_texts(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 200,
        stop_after: str | None = None,
    ) -> list[str]:
        """What the model writes after each prompt, in their order.

        `temperature` 0 is greedy, else samples from the whole distribution (reproducible by `seed`). Prompts are padded
        on the left, those of similar length together. An answer ends at the end-of-text token, after `max_new_tokens`,
        where the model's longest sequence ends, or as soon as the regular expression `stop_after` is found in it; what
        follows the match is cut off.
        """
        import torch

        lengths = [len(self._encoded(prompt).input_ids) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        answers = [""] * len(prompts)
        with _threads_for(self._model), torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                texts = self._batch([prompts[row] for row in rows], max_new_tokens, temperature, stop_after)
                for row, text in zip(rows, texts, strict=True):
                    answers[row] = text
        return answers

    def _batch(self, prompts: list[str], max_new_tokens: int, temperature: float, stop_after: str | None) -> list[str]:
        encoded = self._encoded(prompts, return_tensors="pt", padding=True, padding_side="left").to(self._model.device)
        width = encoded.input_ids.shape[1]
        room = self._model.config.max_position_embeddings - width
        if room <= 0:
            return [""] * len(prompts)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        stopping = [_StopAfter(self._tokenizer, stop_after, width)] if stop_after else []
        generated = self._model.generate(
            input_ids=encoded.input_ids,
            attention_mask=encoded.attention_mask,
            max_new_tokens=min(max_new_tokens, room),
            pad_token_id=self._tokenizer.pad_token_id,
            stopping_criteria=stopping,
            **sampling,
        )
        texts = self._tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
        return [_cut(text, stop_after) for text in texts]

    def _encoded(self, text: str | list[str], **how: Any) -> Any:
        """As training sees text: without what some tokenizers put around it."""
        return self._tokenizer(text, add_special_tokens=False, **how)


@contextmanager
def _threads_for(model: Any) -> Iterator[None]:
    """One thread for a small model: a second one saves a fifth at best, and where another process has its core, threads
    that wait for each other in every matrix product take 15 times as long (measured with 0.36M parameters)."""
    import torch

    before = torch.get_num_threads()
    if model.num_parameters() < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _StopAfter:
    """A transformers stopping criterion: a row is finished once `pattern` is found in what it has generated."""

    def __init__(self, tokenizer: Any, pattern: str, prompt_width: int) -> None:
        self._tokenizer, self._pattern, self._prompt_width = tokenizer, re.compile(pattern), prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        import torch

        texts = self._tokenizer.batch_decode(input_ids[:, self._prompt_width :])
        return torch.tensor([bool(self._pattern.search(text)) for text in texts], device=input_ids.device)


def _cut(text: str, stop_after: str | None) -> str:
    match = re.search(stop_after, text) if stop_after else None
    return text[: match.end()] if match else text


def generate_samples(generator: Generator, prompts: Mapping[str, str], max_new_tokens: int = 48) -> list[Sample]:
    """Greedy continuations of one prompt a kind of text."""
    texts = generator.continue_texts(list(prompts.values()), max_new_tokens=max_new_tokens)
    return [Sample(kind, prompt, text) for (kind, prompt), text in zip(prompts.items(), texts, strict=True)]
