"""torchrun with an exit code that means something: `python -m launch.cluster.agent [--launcher=PID] [torchrun's …]`.

torchrun turns the failure of a rank into a traceback of its own and exit code 1. A rank that met a user's mistake has
already said so in one line and ended with 2: then this ends with 2 and says nothing more. Ranks that were asked to stop
before they could listen end this with 143, and what that means is up to the caller.
"""

import logging
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cluster.parent_death import signal_when_parent_ends
from launch.train.streams import open_standard_streams, say

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

USER_ERROR = 2
TERMINATED = 128 + signal.SIGTERM
LAUNCHER = "--launcher="
_SHOWN_LINES = 30


def main(arguments: list[str]) -> int:
    """Run torchrun and return the exit code: 0, USER_ERROR, TERMINATED, or 1 for any other failure."""
    open_standard_streams()
    if arguments and arguments[0].startswith(LAUNCHER):
        signal_when_parent_ends(signal.SIGKILL, int(arguments.pop(0).removeprefix(LAUNCHER)))
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # What torchrun would log about a failure is said better, or not at all, below.
    logging.disable(logging.ERROR)
    options = parse_args(arguments)
    try:
        run(options)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if USER_ERROR in codes:
            _tell_mistake(error.failures.values(), Path(options.log_dir))
            return USER_ERROR
        if codes == {-signal.SIGTERM}:
            return TERMINATED
        say(_describe(*error.get_first_failure(), Path(options.log_dir)), error=True)
        return 1
    return 0


def _describe(rank: int, failure: "ProcessFailure", log_dir: Path) -> str:
    how = (
        f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"failed with exit code {failure.exitcode}"
    )
    message = f"Training failed: rank {rank} (process {failure.pid}) {how}."
    log = _log_of(failure.local_rank, log_dir)
    if log is None:
        return message
    lines = log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
    return "\n".join([f"{message} The end of {log}:", *lines])


def _tell_mistake(failures: Iterable["ProcessFailure"], log_dir: Path) -> None:
    """The mistake that a rank has found, and not the first one, which has this terminal and says it itself."""
    finders = sorted(failure.local_rank for failure in failures if failure.exitcode == USER_ERROR)
    log = _log_of(finders[0], log_dir) if finders[0] > 0 else None
    lines = log.read_text(errors="replace").splitlines() if log is not None else []
    for line in [line for line in lines if line.startswith("error: ")][-1:]:
        say(f"{line} (rank {finders[0]} on this machine)", error=True)


def _log_of(local_rank: int, log_dir: Path) -> Path | None:
    logs = log_dir.glob(f"*/attempt_*/{local_rank}/stderr.log")
    return max(logs, key=lambda file: file.stat().st_mtime, default=None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
