"""What a completion says: its reasoning, its final answer, and whether it keeps to the format."""

import re

THINK, END_THINK = "<think>", "</think>"

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_WELL_FORMED = re.compile(
    r"<think>(?:(?!</?think>).)*</think>(?:(?!</?think>|\\boxed).)*\\boxed\{[^{}]+\}[^{}]*", re.DOTALL
)


def strip_reasoning(text: str) -> str:
    """The part of a completion that is scored: what follows the last `</think>`.

    Reasoning that never ends leaves nothing; a completion without any (no_think) is left whole.
    """
    if END_THINK in text:
        return text.rsplit(END_THINK, 1)[1]
    return "" if THINK in text else text


def boxed_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{} of a text, without surrounding space; None where there is none."""
    found = _BOXED.findall(text)
    return found[-1].strip() if found else None


def is_right(completion: str, answer: str) -> bool:
    r"""Whether the last \boxed{} after the reasoning holds exactly this answer."""
    return boxed_answer(strip_reasoning(completion)) == answer


def keeps_format(completion: str, *, thinking: bool, ended: bool) -> bool:
    r"""Whether a completion is one closed think block and an answer with one \boxed{}, and ended its turn.

    Without `thinking` the think block must be absent.
    """
    text = completion.strip()
    if not ended:
        return False
    if thinking:
        return _WELL_FORMED.fullmatch(text) is not None
    return THINK not in text and END_THINK not in text and len(_BOXED.findall(text)) == 1
