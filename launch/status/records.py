"""metrics.jsonl of a run that may be weeks old, read in a moment."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from launch.train.metrics import Metrics, parse_metrics

WHOLE_BYTES = 6_000_000
"""A file up to this size, some 20,000 steps, is read whole."""
_TAIL_BYTES = 2_000_000
_SAMPLES, _SAMPLE_BYTES = 64, 32_000


@dataclass(frozen=True)
class Records:
    """What a run's metrics.jsonl says."""

    metrics: Metrics
    is_whole: bool
    """False: only the beginning, the end, and places at even distances were read; what is counted is at least that."""


def read_records(path: Path, whole_bytes: int = WHOLE_BYTES) -> Records:
    """Read a run's records, of a large file a part; none where there is no file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= whole_bytes:
                return Records(parse_metrics(file.read().split(b"\n")), True)
            return Records(parse_metrics(_some_lines(file, size)), False)
    except FileNotFoundError:
        return Records(Metrics([], []), True)


def _some_lines(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Lines in their order. One that is cut at the edge of a place does not parse, and is ignored."""
    tail = size - min(_TAIL_BYTES, size)
    for number in range(_SAMPLES):
        yield from _lines_at(file, number * tail // _SAMPLES, min(_SAMPLE_BYTES, tail // _SAMPLES))
    yield from _lines_at(file, tail, size - tail)


def _lines_at(file: BinaryIO, offset: int, size: int) -> list[bytes]:
    file.seek(offset)
    return file.read(size).split(b"\n")
