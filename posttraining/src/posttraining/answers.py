"""What a completion says: its final answer, and whether it keeps to the format of a mode."""

from __future__ import annotations

import re

from posttraining.chat import END_OF_THINK, THINK

_THOUGHT = re.compile(r"<think>(?P<thought>.+?)</think>(?P<answer>.+)", re.DOTALL)
_BOX = re.compile(r"\\boxed\{([^{}]+)\}")


def strip_reasoning(text: str) -> str:
    """The part of a completion that is scored: what follows its thoughts.

    A thought that never ends leaves nothing; a completion without any (no_think) is left whole.
    """
    if END_OF_THINK in text:
        return text.rsplit(END_OF_THINK, 1)[1].lstrip("\n")
    return "" if THINK in text else text


def boxed_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{} after the thoughts, without surrounding space; None where there is none."""
    found = _BOX.findall(strip_reasoning(text))
    return found[-1].strip() if found else None


def is_right(text: str, answer: str) -> bool:
    r"""Whether the last \boxed{} after the thoughts holds exactly this answer."""
    return boxed_answer(text) == answer


def keeps_format(text: str, *, thinking: bool) -> bool:
    r"""Whether a completion is one closed thought, then text with one \boxed{}; without `thinking`, only the latter."""
    answer = text.strip()
    if thinking:
        parts = _THOUGHT.fullmatch(answer)
        if parts is None or THINK in parts["thought"]:
            return False
        answer = parts["answer"]
    return THINK not in answer and END_OF_THINK not in answer and len(_BOX.findall(answer)) == 1
