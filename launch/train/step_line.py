"""What a person watches: one line with every number a trainer wants, and the tables of validation losses."""

import dataclasses
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.train.metrics import Event, StepRecord
from launch.train.streams import silence

_RECENT_STEPS = 20
"""The remaining time, and on a terminal the speeds, are told from so many steps."""
_WAIT_WORTH_SAYING = 0.5


class StepLine:
    """A callback that shows the newest step: in place on a terminal, as lines now and then in a log file."""

    def __init__(
        self, train_steps: int, *, every_steps: int = 1, every_seconds: float = 5.0, console: Console | None = None
    ):
        """Show steps up to `train_steps`.

        In a log, a line is at least `every_steps` steps and `every_seconds` seconds of training after the one before;
        the first step after a start and the last one always have a line. Speeds are means since the line before.
        """
        self.console = console or Console(soft_wrap=True)
        self._train_steps = train_steps
        self._every_steps = every_steps
        self._every_seconds = every_seconds
        self._recent: deque[StepRecord] = deque(maxlen=_RECENT_STEPS)
        self._last: StepRecord | None = None
        self._unshown: list[StepRecord] = []
        self._unshown_seconds = 0.0
        self._live: Live | None = None
        self._is_heard = True

    def on_step(self, record: StepRecord) -> None:
        """Show a step."""
        is_first = self._last is None
        self._last = record
        self._recent.append(record)
        if self.console.is_terminal:
            self._say(lambda: self._show_live(average(self._recent)))
            return
        self._unshown.append(record)
        self._unshown_seconds += record.step_seconds
        is_due = len(self._unshown) >= self._every_steps and self._unshown_seconds >= self._every_seconds
        if is_first or is_due or record.step == self._train_steps:
            self._print_plain()

    def on_event(self, event: Event) -> None:
        """Show validation losses, skipped steps, spikes and what follows; other events are for other callbacks."""
        if event["event"] == "validation" and event["validation_loss"]:
            losses = "  ".join(f"{source} {_number(loss)}" for source, loss in event["validation_loss"].items())
            self.print(f"step {event['step']}: validation loss (nats/token)  {losses}")
        elif event["event"] == "checkpoint":
            self._show_save(event)
        elif event["event"] in ("upload", "slow_upload", "upload_problem"):
            self._show_upload(event)
        elif event["event"] == "skipped":
            sources = ", ".join(event["sources"])
            self.print(f"step {event['step']}: skipped, loss or gradient norm is not finite (sources: {sources})")
        elif event["event"] == "spike":
            spike, median = _number(event["spike_loss"]), _number(event["median"])
            self.print(f"step {event['step']}: loss spike, {spike} where the median is {median}")
        elif event["event"] == "rewind":
            self._show_rewind(event)

    def _show_save(self, event: Event) -> None:
        """A save that went well is in the record only; what cost time or failed is said."""
        step, waited = event["step"], event["waited_seconds"]
        if waited >= _WAIT_WORTH_SAYING:
            self.print(f"step {step}: training waited {waited:.1f} s: the save before was still being written")
        if event["error"] is not None:
            self.print(f"step {step}: not saved: {event['error']}; training goes on, the next save is tried when due")

    def _show_upload(self, event: Event) -> None:
        """As with saves: only what somebody should look at."""
        waiting = ", ".join(map(str, event.get("waiting", []))) or "none"
        if event["event"] == "slow_upload":
            took, between = (f"{event[key]:,.1f} s" for key in ("upload_seconds", "save_seconds"))
            self.print(
                f"step {event['step']}: its upload took {took}, and a checkpoint is saved every {between}: "
                "uploads fall behind; save less often, or allow more (s3_upload.workers, max_megabytes_per_second)"
            )
        elif event["event"] == "upload" and event["error"] is not None:
            self.print(f"step {event['step']}: not uploaded, {event['error']}")
        elif event["event"] == "upload_problem" and event["reason"] is not None:
            self.print(f"uploads: {event['reason']}; training goes on, steps that wait: {waiting}")
        elif event["event"] == "upload_problem":
            self.print(f"uploads: they go on, steps that wait: {waiting}")

    def _show_rewind(self, event: Event) -> None:
        for step, reason in event["refused"].items():
            self.print(f"checkpoint of step {step} refused: {reason}")
        if event["to"] is None:
            self.print(f"step {event['step']}: training goes on after the spike: {event['reason']}")
            return
        first, end = event["skipped"]
        self.print(f"step {event['step']}: back to step {event['to']}; batches {first} to {end - 1} are skipped")

    def print(self, *what: object) -> None:
        """Print above the live line; everything that rank 0 says during training goes through here."""
        # A sample or a path may hold brackets, which rich would take for markup.
        self._say(lambda: self.console.print(*what, markup=False, highlight=False))

    def close(self) -> None:
        """Leave the last step on the screen."""
        if self._live is not None:
            self._say(self._end_live)
        elif self._unshown:
            self._print_plain()

    def _say(self, show: Callable[[], None]) -> None:
        """Show something where somebody looks: when the reader of a pipe has gone, the training goes on in silence."""
        if not self._is_heard:
            return
        try:
            show()
        except (OSError, ValueError, SystemExit):  # rich ends the process when a pipe is closed
            self._is_heard = False
            with suppress(OSError, ValueError, SystemExit):
                self._end_live()
            silence(sys.stdout)

    def _end_live(self) -> None:
        """Stop to redraw the line; only then is stderr what it was before."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _show_live(self, record: StepRecord) -> None:
        line = Text(self._format(record), no_wrap=True, overflow="ellipsis")
        if self._live is None:
            self._live = Live(line, console=self.console, auto_refresh=True, refresh_per_second=8)
            self._live.start()
        else:
            self._live.update(line)

    def _print_plain(self) -> None:
        self.print(self._format(average(self._unshown)))
        self._unshown.clear()
        self._unshown_seconds = 0.0

    def _format(self, record: StepRecord) -> str:
        seconds = sum(recent.step_seconds for recent in self._recent) / len(self._recent)
        return format_step(record, self._train_steps, (self._train_steps - record.step) * seconds)


def average(records: Sequence[StepRecord]) -> StepRecord:
    """The last of some records, with the speeds and times of a mean step: what a line tells of the steps it is for."""
    last, seconds = records[-1], sum(record.step_seconds for record in records)
    if seconds <= 0:
        return last

    def mean(values: Iterable[float]) -> float:
        return sum(value * record.step_seconds for value, record in zip(values, records, strict=True)) / seconds

    fractions = [record.mfu for record in records if record.mfu is not None]
    return dataclasses.replace(
        last,
        tokens_per_second=mean(record.tokens_per_second for record in records),
        mfu=mean(fractions) if len(fractions) == len(records) else None,
        step_seconds=seconds / len(records),
        data_wait_seconds=sum(record.data_wait_seconds for record in records) / len(records),
    )


def format_step(record: StepRecord, train_steps: int, seconds_left: float) -> str:
    """One line about a step."""
    width = len(str(train_steps))
    waiting = record.data_wait_seconds / record.step_seconds if record.step_seconds > 0 else 0.0
    parts = [
        # What matters most comes first: a narrow terminal cuts the end off.
        f"step {record.step:>{width}}/{train_steps} {record.step / train_steps:4.0%}",
        f"{format_seconds(seconds_left):>6} left",
        f"loss {_number(record.loss)}",
        f"lr {record.lr:.2e}",
        f"norm {_number(record.grad_norm, 3)}",
        f"{record.tokens_per_second:,.0f} tok/s",
        record.stage,
        f"mfu {'n/a' if record.mfu is None else format(record.mfu, '.1%')}",
        f"wait {waiting:.1%}",
        f"mem {format_bytes(record.memory_peak_bytes)}",
    ]
    return " | ".join(parts)


@dataclass(frozen=True)
class ValidationRow:
    """One source's validation loss, for people."""

    source: str
    """Its name in the recipe."""
    before: float | None
    """Nats per token before training; None where it is not known, as after a resume."""
    after: float
    """Nats per token now."""
    bytes_per_token: float | None
    """UTF-8 bytes of the validation text per token; None where the text is not known."""
    bigram_bits_per_byte: float | None
    """What a bigram model of tokens that the run trained on needs."""


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Convert a loss to a unit in which tokenizers can be compared."""
    return nats_per_token / math.log(2) / bytes_per_token


def validation_table(rows: Sequence[ValidationRow]) -> Table:
    """A table of validation losses by source, before and after, beside the bigram model."""
    table = Table(title="Validation loss", title_justify="left")
    table.add_column("source")
    for heading in (
        "before\nnats/token",
        "after\nnats/token",
        "before\nbits/byte",
        "after\nbits/byte",
        "bigram\nbits/byte",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.source,
            _number(row.before),
            _number(row.after),
            _bits(row.before, row.bytes_per_token),
            _bits(row.after, row.bytes_per_token),
            _number(row.bigram_bits_per_byte, 3),
        )
    return table


def format_bytes(count: int) -> str:
    """`532 MB`, `1.3 GB` (powers of ten)."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def format_seconds(seconds: float) -> str:
    """`42s`, `3m07s`, `2h05m`, `12d03h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _number(value: float | None, digits: int = 4) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _bits(nats: float | None, bytes_per_token: float | None) -> str:
    return "n/a" if nats is None or bytes_per_token is None else _number(bits_per_byte(nats, bytes_per_token), 3)
