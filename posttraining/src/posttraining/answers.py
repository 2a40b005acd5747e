"""What a completion says: its final answer, and whether it keeps to the format of a mode."""

from __future__ import annotations

import re
from dataclasses import dataclass

from posttraining.chat import END_OF_THINK, THINK

_THOUGHT = re.compile(r"<think>(?P<thought>.+?)</think>(?P<answer>.+)", re.DOTALL)
# Line breaks and escaped braces are matched so that what follows the backslash counts for nothing.
_BRACES = re.compile(r"\\boxed\{|\\\\(?!boxed\{)|\\[{}]|[{}]")


@dataclass(frozen=True)
class Box:
    r"""One \boxed{…} of a text."""

    content: str
    """What stands between its braces, without surrounding space."""
    end: int
    """The place in the text that follows its closing brace."""


def strip_reasoning(text: str) -> str:
    """The part of a completion that is scored: what follows its thoughts.

    A thought that never ends leaves nothing; a completion without any (no_think) is left whole.
    """
    if END_OF_THINK in text:
        return text.rsplit(END_OF_THINK, 1)[1].lstrip("\n")
    return "" if THINK in text else text


def find_boxes(text: str) -> list[Box]:
    r"""Every \boxed{…} that is closed and not empty, in order; of one within another only the inner one.

    Braces are counted, so that \boxed{\frac{1}{2}} is whole; escaped ones, \{ and \}, do not count.
    """
    opened: list[int | None] = []  # of each brace that is open, where its box begins; None: it is no box's
    boxes: list[Box] = []
    begins = -1  # the last box
    for found in _BRACES.finditer(text):
        match found[0]:
            case "{":
                opened.append(None)
            case "\\boxed{":
                opened.append(found.end())
            case "}" if opened:
                start = opened.pop()
                if start is not None and start > begins and (content := text[start : found.start()].strip()):
                    boxes.append(Box(content, found.end()))
                    begins = start
    return boxes


def boxed_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{} after the thoughts, without surrounding space; None where there is none."""
    boxes = find_boxes(strip_reasoning(text))
    return boxes[-1].content if boxes else None


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
    return THINK not in answer and END_OF_THINK not in answer and len(find_boxes(answer)) == 1
