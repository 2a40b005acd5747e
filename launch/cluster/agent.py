"""torchrun with an exit code that means something:
`python -m launch.cluster.agent [--launcher=PID] [--report=FILE] [torchrun's …]`.

torchrun turns the failure of a rank into a traceback of its own and exit code 1. A rank that met a user's mistake has
already said so in one line and ended with 2: then this ends with 2 and says nothing more. Ranks that were asked to stop
before they could listen end this with 143, and what that means is up to the caller.

With `--report` the end is written to a file as well, and SIGTERM is left to the ranks: on a cluster it reaches every
process of a node, and torchrun would give the ranks seconds to save.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cluster.parent_death import AGENT_VARIABLE, signal_when_parent_ends
from launch.train.streams import describe, open_standard_streams, say
from nanotron_recipes.files import write_atomic

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

USER_ERROR = 2
TERMINATED = 128 + signal.SIGTERM
LAUNCHER = "--launcher="
REPORT = "--report="
_SHOWN_LINES = 30


def main(arguments: list[str]) -> int:
    """Run torchrun and return the exit code: 0, USER_ERROR, TERMINATED, or 1 for any other failure."""
    open_standard_streams()
    launcher, report = _taken(arguments, LAUNCHER), _taken(arguments, REPORT)
    if launcher is not None:
        signal_when_parent_ends(signal.SIGKILL, int(launcher))
    os.environ[AGENT_VARIABLE] = str(os.getpid())
    if report is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until torchrun listens, which it is kept from below
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # What torchrun would log about a failure is said better, or not at all, below.
    logging.disable(logging.ERROR)
    options = parse_args(arguments)
    if report is not None and hasattr(options, "signals_to_handle"):
        options.signals_to_handle = "SIGQUIT"
    try:
        run(options)
    except ChildFailedError as error:
        code, message = _judge(error, Path(options.log_dir))
        if report is not None:
            failures = error.failures.values()
            _write_report(Path(report), code, message, list(failures))
        return code
    except Exception as error:  # of torchrun itself: the nodes do not find each other, a port is taken, a disk is full
        message = f"torchrun failed: {type(error).__name__}: {describe(error)}"
        say(f"Training failed: {message}", error=True)
        if report is not None:
            _write_report(Path(report), 1, message, [], failed_at=time.time())
        return 1
    if report is not None:
        _write_report(Path(report), 0, "", [])
    return 0


def _taken(arguments: list[str], option: str) -> str | None:
    """The value of an option of ours, which are the first arguments, and no longer are."""
    if not arguments or not arguments[0].startswith(option):
        return None
    return arguments.pop(0).removeprefix(option)


def _judge(error: "ChildFailedError", log_dir: Path) -> tuple[int, str]:
    """The exit code, and what the failure was, which is said unless the rank that found it has."""
    codes = {failure.exitcode for failure in error.failures.values()}
    if USER_ERROR in codes:
        return USER_ERROR, _tell_mistake(error.failures.values(), log_dir)
    if codes == {-signal.SIGTERM}:
        return TERMINATED, "its ranks were ended by SIGTERM"
    message = _describe(*first_failure(error.failures), log_dir)
    say(message, error=True)
    return 1, message.partition(". The end of ")[0]


def first_failure(failures: "Mapping[int, ProcessFailure]") -> tuple[int, "ProcessFailure"]:
    """Of failures by rank, where it began: one that was killed rather than one that lost its peers, and then the
    earliest (which with nccl, where ranks that lose a peer end themselves by SIGABRT, is the cause)."""
    return min(failures.items(), key=lambda item: (not _is_killed(item[1]), item[1].timestamp))


def _is_killed(failure: "ProcessFailure") -> bool:
    """By something else than the launcher or torchrun, which end ranks with SIGTERM, and than itself: torch's watchdog
    ends a rank whose collective fails by SIGABRT."""
    return failure.exitcode < 0 and failure.exitcode not in (-signal.SIGTERM, -signal.SIGABRT)


def _write_report(
    report: Path, code: int, message: str, failures: "list[ProcessFailure]", failed_at: float | None = None
) -> None:
    """For `launch.cluster.node`; a full disk loses what it says, not the exit code."""
    content = {
        "code": code,
        "message": message,
        "failed_at": min((failure.timestamp for failure in failures), default=failed_at),
        "is_by_signal": any(map(_is_killed, failures)),
    }
    with suppress(OSError):
        write_atomic(report, json.dumps(content))


def _describe(rank: int, failure: "ProcessFailure", log_dir: Path) -> str:
    how = (
        f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"failed with exit code {failure.exitcode}"
    )
    message = f"Training failed: rank {rank} (process {failure.pid}) {how}."
    log = _log_of(failure.local_rank, log_dir)
    lines = log.read_text(errors="replace").rstrip().splitlines()[-_SHOWN_LINES:] if log is not None else []
    if not lines:
        return message
    return "\n".join([f"{message} The end of {log}:", *lines])


def _tell_mistake(failures: Iterable["ProcessFailure"], log_dir: Path) -> str:
    """Say the mistake that a rank has found, and not the first one, which has this terminal and says it itself."""
    finders = sorted(failure.local_rank for failure in failures if failure.exitcode == USER_ERROR)
    log = _log_of(finders[0], log_dir) if finders[0] > 0 else None
    lines = log.read_text(errors="replace").splitlines() if log is not None else []
    for line in [line for line in lines if line.startswith("error: ")][-1:]:
        say(f"{line} (rank {finders[0]} on this machine)", error=True)
        return line.removeprefix("error: ")
    return "a mistake in the recipe or the data (see the job's log)"


def _log_of(local_rank: int, log_dir: Path) -> Path | None:
    logs = log_dir.glob(f"*/attempt_*/{local_rank}/stderr.log")
    return max(logs, key=lambda file: file.stat().st_mtime, default=None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
