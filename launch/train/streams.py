"""What a process of a training says. Nothing that is printed may end a run: neither streams that were closed before
the process started, nor a reader that has gone away (`| head -1`)."""

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO


def open_standard_streams() -> None:
    """Put /dev/null where stdin, stdout or stderr are closed, also for the processes that this one starts.

    Otherwise the next file that is opened has the number of the closed one, and what a library prints goes into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            os.set_inheritable(opened, True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def tolerate_lost_output() -> None:
    """From now on, what stdout and stderr do not take (a full disk, a terminal that is gone, a pipe that nobody reads)
    is dropped and raises nothing, whoever prints; what comes later is printed again."""
    sys.stdout, sys.stderr = _tolerant(sys.stdout), _tolerant(sys.stderr)


class _TolerantFile(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _tolerant(stream: TextIO) -> TextIO:
    """The stream again, in front of a file that drops; a stream that is no plain file stays as it is."""
    if type(stream) is not io.TextIOWrapper:
        return stream
    old = getattr(stream.buffer, "raw", stream.buffer)  # without a buffer where PYTHONUNBUFFERED is set
    if type(old) is not io.FileIO:
        return stream
    with suppress(OSError):
        stream.flush()
    file = _TolerantFile(old.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        file if stream.buffer is old else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def say(text: str, *, error: bool = False) -> None:
    """Print a line to stdout, or to stderr, where anybody reads it."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):  # ValueError: the stream was closed
        silence(stream)


def silence(stream: TextIO) -> None:
    """Send what is still printed to a stream nowhere, what the interpreter flushes at its end included."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # a stream without a file, or a closed one
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def describe(error: BaseException) -> str:
    """What an exception says, in one line; an error of the system says `file: reason`."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    return " ".join(text.split())
