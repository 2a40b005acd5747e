"""What transformers warns of after a resume, and when it saves, although nothing is wrong."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("transformers.trainer", "transformers.trainer_utils")
_MISSING_HEAD = re.compile(r"There were missing keys in the checkpoint model loaded: \['lm_head\.weight'\]\.$")
_SHARE = re.compile(r"\s*(save|eval|logging)_steps: 0\.\d+ \(from args\) != \d+ \(from trainer_state\.json\)$")

# Small checkpoints follow each other within a second; by their numbers they are in the right order.
_ORDER = "mtime may not be reliable on this filesystem, falling back to numerical ordering"


@contextmanager
def harmless_left_out(*, tied: bool) -> Iterator[None]:
    """Within this block those warnings are not shown. `tied`: the model's head is its embedding."""
    harmless = _Harmless(tied)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(harmless)
    try:
        yield
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(harmless)


class _Harmless(logging.Filter):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self._tied = tied

    def filter(self, record: logging.LogRecord) -> bool:
        head, *lines = record.getMessage().split("\n")
        if _MISSING_HEAD.match(head):
            return not self._tied  # a tied head is not stored: it is loaded as the embedding
        if head.startswith("Warning: The following arguments do not match the ones in the `trainer_state.json`"):
            # A share of the steps, such as 0.25, is compared with the number that the trainer has made of it.
            return not all(_SHARE.match(line) for line in lines)
        return head != _ORDER
