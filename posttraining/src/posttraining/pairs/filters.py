"""Which answers make a pair, and why the others do not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from posttraining.answers import is_right, keeps_format, strip_reasoning
from posttraining.generation import Answer
from posttraining.pairs.prompts import Prompt
from posttraining.pairs.settings import FilterSettings

Pair = tuple[Answer, Answer]
"""Chosen, rejected."""


class Filters:
    """Chooses pairs and counts what was left out, by reason."""

    def __init__(self, settings: FilterSettings, *, thinking: bool = True) -> None:
        self.reasons: Counter[str] = Counter()
        self._settings, self._thinking = settings, thinking
        self._refusals = [re.compile(pattern, re.IGNORECASE) for pattern in settings.refusals]

    def choose(self, prompt: Prompt, chosen: Sequence[Answer], rejected: Sequence[Answer]) -> Pair | None:
        """The first chosen and the first rejected answer that pass, as a pair; None where there is none."""
        good = self._first(chosen, lambda answer: self._objection(answer, prompt, wanted_right=True), "chosen")
        if good is None:
            return None
        bad = self._first(rejected, lambda answer: self._objection(answer, prompt, wanted_right=False), "rejected")
        if bad is None:
            return None
        reason = self._objection_to_pair(good, bad)
        if reason:
            self.reasons[reason] += 1
            return None
        return good, bad

    def _first(self, answers: Sequence[Answer], objection: Callable[[Answer], str | None], side: str) -> Answer | None:
        reasons = []
        for answer in answers:
            reason = objection(answer)
            if reason is None:
                return answer
            reasons.append(reason)
        self.reasons[f"{side}: {reasons[0]}"] += 1
        return None

    def _objection(self, answer: Answer, prompt: Prompt, *, wanted_right: bool) -> str | None:
        settings = self._settings
        if not answer.stopped:
            return "does not end"
        if answer.tokens < settings.min_tokens or answer.tokens > (settings.max_tokens or answer.tokens):
            return "length"
        said = strip_reasoning(answer.text)
        if any(pattern.search(said) for pattern in self._refusals):
            return "refusal"
        if wanted_right and settings.format and not keeps_format(answer.text, thinking=self._thinking):
            return "format"
        if settings.check != "none":
            right = self._is_right(answer.text, prompt.answer)
            if right is None:
                return "cannot be verified"
            if right != wanted_right:
                return "wrong" if wanted_right else "right"
        return None

    def _is_right(self, text: str, answer: str | None) -> bool | None:
        if answer is None:
            return None
        if self._settings.check == "exact":
            return is_right(text, answer)
        from posttraining.rewards import math_accuracy

        verdict = math_accuracy(completions=[[{"role": "assistant", "content": text}]], answer=[answer])[0]
        return None if verdict is None else verdict == 1

    def _objection_to_pair(self, chosen: Answer, rejected: Answer) -> str | None:
        if chosen.text.strip() == rejected.text.strip():
            return "identical answers"
        longer, shorter = sorted((chosen.tokens, rejected.tokens), reverse=True)
        if self._settings.max_length_ratio is not None and longer > self._settings.max_length_ratio * shorter:
            return "lengths too different"
        return None
