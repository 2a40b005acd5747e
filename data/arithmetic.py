"""Generated arithmetic in a layout that a very small model can learn: two-digit sums and differences, units first.

    Compute 47+86?
    7+6+0=13; 4+8+1=13
    The answer is \\boxed{133}.

The third term is the carry from the digit before; a difference ends a digit in `b` where it borrows (`2-8-0=4b`).
A problem is held out from every training text by its own hash alone, so that anyone can tell without this code:
the first four bytes of sha256 of `47+86` (operands of a sum in rising order) or `86-47`, as a big-endian number, lie
in the lowest tenth.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from data.order import derive_key, mix64

SMALLEST, LARGEST = 10, 99
HELD_OUT_SHARE = 0.1

_SHORT_TO, _CHECK_TO, _TWICE_TO = 64, 79, 94
"""Of 100 documents 64 are short, 15 check the answer, 15 also go over it once more, 6 are the bare equation."""


@dataclass(frozen=True)
class Problem:
    """A held-out problem of the evaluation."""

    question: str
    """The prompt, with the line break after which a model answers: `Compute 47+86?` and a newline."""
    answer: str
    """The number that belongs into \\boxed{}, in decimal."""


def is_held_out(left: int, sign: str, right: int) -> bool:
    """Whether `left sign right` (sign + or -) appears in no training text."""
    if sign == "+":
        left, right = min(left, right), max(left, right)
    digest = hashlib.sha256(f"{left}{sign}{right}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def document(seed: int, index: int, *, held_out: bool) -> str:
    """The index-th document with this seed: a pure function of its arguments.

    With `held_out` false neither the problem nor a check line shows a held-out problem; with true the problem is one.
    """
    key = derive_key(seed, "arithmetic", "held out" if held_out else "train", index)
    while True:
        key = mix64(key + 1)
        left, sign, right = _draw(key)
        if is_held_out(left, sign, right) == held_out:
            return _text(left, sign, right, key >> 48, with_check=held_out or not _check_is_held_out(left, sign, right))


def held_out_problems(count: int, seed: int) -> list[Problem]:
    """`count` different held-out problems, sums and differences mixed, in an order chosen by `seed`.

    Raises ValueError where there are fewer.
    """
    operations = list(_held_out_operations())
    if count > len(operations):
        raise ValueError(f"there are {len(operations)} held-out problems, {count} were asked for")
    chooser = random.Random(seed)
    problems = []
    for left, sign, right in chooser.sample(operations, count):
        if sign == "+" and chooser.random() < 0.5:
            left, right = right, left
        problems.append(Problem(f"Compute {left}{sign}{right}?\n", str(_result(left, sign, right))))
    return problems


@lru_cache(maxsize=1)
def _held_out_operations() -> tuple[tuple[int, str, int], ...]:
    pairs = [(a, b) for a in range(SMALLEST, LARGEST + 1) for b in range(a, LARGEST + 1)]
    sums = [(a, "+", b) for a, b in pairs if is_held_out(a, "+", b)]
    differences = [(b, "-", a) for a, b in pairs if is_held_out(b, "-", a)]
    return (*sums, *differences)


def _draw(key: int) -> tuple[int, str, int]:
    span = LARGEST - SMALLEST + 1
    left, right = SMALLEST + (key & 0xFFFF) % span, SMALLEST + (key >> 16 & 0xFFFF) % span
    if key >> 32 & 1:
        return left, "+", right
    return max(left, right), "-", min(left, right)


def _result(left: int, sign: str, right: int) -> int:
    return left + right if sign == "+" else left - right


def _check(left: int, sign: str, right: int) -> tuple[int, str, int]:
    return _result(left, sign, right), "-" if sign == "+" else "+", right


def _check_is_held_out(left: int, sign: str, right: int) -> bool:
    first, opposite, second = _check(left, sign, right)
    return SMALLEST <= first <= LARGEST and is_held_out(first, opposite, second)


def _digits(left: int, sign: str, right: int) -> str:
    return "; ".join(_digit_steps(left, sign, right))


def _digit_steps(left: int, sign: str, right: int) -> Iterator[str]:
    carry = 0
    for x, y in ((left % 10, right % 10), (left // 10, right // 10)):
        if sign == "+":
            value = x + y + carry
            yield f"{x}+{y}+{carry}={value}"
            carry = value // 10
        else:
            value = x - y - carry
            yield f"{x}-{y}-{carry}={value % 10}{'b' if value < 0 else ''}"
            carry = int(value < 0)


def _text(left: int, sign: str, right: int, draw: int, *, with_check: bool) -> str:
    result = _result(left, sign, right)
    kind = draw % 100
    if kind >= _TWICE_TO:
        return f"{left}{sign}{right}={result}"
    lines = [f"Compute {left}{sign}{right}?", _digits(left, sign, right)]
    if kind >= _SHORT_TO and with_check:
        first, opposite, second = _check(left, sign, right)
        lines.append(f"Check: {first}{opposite}{second}={left}.")
        if kind >= _CHECK_TO:
            lines.append(f"Once more: {_digits(left, sign, right)}")
    lines.append(f"The answer is \\boxed{{{result}}}.")
    return "\n".join(lines)
