"""Checkpoints are evaluated as they appear: beside the training, by a process or a Slurm job of its own for each.

Nothing that becomes of an evaluation is of any concern to the training: it is never waited for while steps are taken.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from launch.train.metrics import Event, StepRecord
from launch.train.outage import reason
from launch.train.streams import say
from nanotron_recipes.errors import UserError

_END_SECONDS = 10.0
_LONGEST_TOLD = 300
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
_OF_TORCHRUN_OR_JOB = ("TORCHELASTIC_", "TORCH_NCCL_", "GROUP_", "ROLE_", "SLURM_")
_WHERE_SLURM_IS = "SLURM_CONF"


class Evaluator(Protocol):
    """How an evaluation is started."""

    def command(self, step: int) -> list[str]:
        """The command that evaluates a step, or submits a job that does. Raises OSError, UserError."""

    def log(self, step: int) -> Path:
        """Where what it prints goes."""

    def told(self, last_line: str) -> str:
        """What to say when it has ended well."""


class Evaluations:
    """A callback that starts an evaluation after a checkpoint was saved, one at a time; of those that have to wait only
    the newest is evaluated.

    Args:
        interval: steps between two evaluations: the first checkpoint from each multiple on is evaluated; None: every
            one.
        first_step: of this launch.
        record: takes the event of an evaluation that could not record one itself.
        is_asked_to_stop: then an evaluation at the end is not waited for.
        longest_end_seconds: how long it is waited for otherwise.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        interval: int | None,
        first_step: int,
        record: Callable[[Event], None],
        is_asked_to_stop: Callable[[], bool],
        tell: Callable[[str], None] = say,
        environment: Mapping[str, str] = os.environ,
        longest_end_seconds: float = 60.0,
    ) -> None:
        self._evaluator = evaluator
        self._interval = interval or 1
        self._last = first_step - 1
        self._record = record
        self._is_asked_to_stop = is_asked_to_stop
        self._tell = tell
        self._environment = evaluation_environment(environment)
        self._longest_end_seconds = longest_end_seconds
        self._running: tuple[int, subprocess.Popen[bytes]] | None = None
        self._pending: int | None = None

    def on_step(self, record: StepRecord) -> None:
        """Look whether an evaluation has ended."""
        self._look()

    def on_event(self, event: Event) -> None:
        """Note a checkpoint that was saved, and that the run goes back."""
        if event["event"] == "rewind" and event["to"] is not None:
            self._last = min(self._last, event["to"])
            if self._pending is not None and self._pending > event["to"]:
                self._pending = None
        elif event["event"] == "checkpoint" and event["error"] is None:
            step = event["step"]
            if step // self._interval > self._last // self._interval:
                self._last = step
                if self._pending is not None:
                    self._tell(f"step {self._pending}: not evaluated: step {step} is newer")
                self._pending = step
                self._look()

    def close(self) -> None:
        """Wait for a while, and not at all where the run was asked to stop; then end what is still going on."""
        deadline = time.monotonic() + self._longest_end_seconds
        self._look()
        while self._running is not None and time.monotonic() < deadline and not self._is_asked_to_stop():
            time.sleep(0.05)
            self._look()
        if self._running is not None:
            self._end(*self._running)
        if self._pending is not None:
            self._failed(self._pending, "the launch ended before it began")

    def _look(self) -> None:
        if self._running is not None:
            step, process = self._running
            code = process.poll()
            if code is None:
                return
            self._running = None
            self._ended(step, code)
        if self._pending is not None:
            step, self._pending = self._pending, None
            self._start(step)

    def _start(self, step: int) -> None:
        log = self._evaluator.log(step)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            command = self._evaluator.command(step)
            with log.open("ab") as output:
                # Started by the main thread: the kernel ends it with the thread that started it.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                )
        except (OSError, UserError) as error:
            self._failed(step, f"could not be started: {reason(error)}")
        else:
            self._running = (step, process)

    def _ended(self, step: int, code: int) -> None:
        last_line = _last_line(self._evaluator.log(step))
        if code == 0:
            self._tell(f"evaluation: {self._evaluator.told(last_line)}")
        elif code == 1:  # it has recorded why
            self._tell(f"evaluation: {last_line} (see {self._evaluator.log(step)})")
        else:
            how = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
            self._failed(step, f"ended by {how}" if code < 0 else f"ended with {how}: {last_line}")

    def _end(self, step: int, process: "subprocess.Popen[bytes]") -> None:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._running = None
        self._failed(step, "was ended with the launch")

    def _failed(self, step: int, why: str) -> None:
        self._tell(f"evaluation: step {step}: {why} (see {self._evaluator.log(step)})")
        self._record({"event": "evaluation", "step": step, "error": why})


def evaluation_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What an evaluation starts with: it is no rank, and not in the training's job."""
    return {
        name: value
        for name, value in environment.items()
        if name == _WHERE_SLURM_IS or (name not in _OF_A_RANK and not name.startswith(_OF_TORCHRUN_OR_JOB))
    }


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:_LONGEST_TOLD] for line in reversed(lines) if line.strip()), "")
