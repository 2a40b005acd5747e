"""Nothing that is printed may end a training: closed streams, readers that have gone, terminals that were hung up."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from faulty_disks import fill
from rich.console import Console
from small_pretraining import StartProcess, pretrain_command
from test_step_line import record

from launch.train.metrics import validation_event
from launch.train.step_line import StepLine
from launch.train.streams import describe, open_standard_streams, say

PROGRAM_OF_NOTHING = """
import os, sys
from launch.train.streams import open_standard_streams
open_standard_streams()
said = open(sys.argv[1], "w")
print("to nobody"); print("to nobody", file=sys.stderr); os.write(1, b"nobody"); os.write(2, b"nobody")
import shlex
import subprocess
child = "import os; os.write(1, b'x'); os.write(2, b'y'); os.read(0, 1)"
code = subprocess.run([sys.executable, "-c", child]).returncode
said.write(f"{said.fileno()} {code}")
"""
STEPS_INTO_A_PIPE = """
import dataclasses, sys, time
from rich.console import Console
from small_pretraining import StartProcess, pretrain_command
from launch.train.step_line import StepLine
from launch.train.streams import say
from test_step_line import record
line = StepLine(2000, every_seconds=0.0, console=Console(soft_wrap=True, force_terminal="live" in sys.argv))
for step in range(1, 400):
    line.on_step(record(step))
    line.print("[x" * 200)
    if "live" in sys.argv:
        time.sleep(0.002)
say("more")
line.close()
print("trained to the end", file=sys.stderr)
"""

TALKER = """
import os, sys
from launch.train.streams import say, tolerate_lost_output
tolerate_lost_output()
for line in sys.stdin:
    for stream in (sys.stdout, sys.stderr):
        print(line.strip() + "!" * 9000, file=stream, flush=True)
    say(line.strip())
    os.write(int(sys.argv[1]), b".")
print("the end")
"""


def test_closed_streams_get_no_file_of_the_run(tmp_path: Path) -> None:
    out = tmp_path / "said"
    command = [sys.executable, "-c", PROGRAM_OF_NOTHING, str(out)]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command])
    number, code = out.read_text().split()
    assert done.returncode == 0 and int(number) > 2 and code == "0"


@pytest.mark.parametrize("mode", ["plain", "live"])
def test_a_reader_that_goes_away_ends_no_training(mode: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", STEPS_INTO_A_PIPE, mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "trained to the end\n"
    assert process.wait() == 0


class HungUp(io.StringIO):
    """A terminal that is gone."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_terminal_that_is_gone_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", HungUp())
    line = StepLine(9, console=Console(file=HungUp(), force_terminal=True))
    for step in range(1, 4):
        line.on_step(record(step))
    line.on_event(validation_event(3, {"code": 1.0}))
    line.close()
    say("more")
    monkeypatch.setattr(sys, "stderr", None)
    say("nobody is there", error=True)


def test_streams_that_are_open_stay_as_they_are() -> None:
    before = [os.fstat(number).st_ino for number in range(3)]
    open_standard_streams()
    assert [os.fstat(number).st_ino for number in range(3)] == before


def test_an_error_of_the_system_is_one_line() -> None:
    with pytest.raises(OSError) as caught:
        Path("/nowhere/at/all").read_text()
    assert describe(caught.value) == "/nowhere/at/all: No such file or directory"
    assert describe(OSError("2 of 3\n bytes")) == "2 of 3 bytes"
    assert describe(OSError(28, "No space left on device")) == "No space left on device"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_is_printed_to_a_full_disk_raises_nothing_and_comes_again(unbuffered: str, small_disk: Path) -> None:
    log, (heard, told) = small_disk / "log", os.pipe()
    with log.open("w") as out, open(heard, "rb") as answers, open(told, "wb") as answer:
        process = subprocess.Popen(
            [sys.executable, "-c", TALKER, str(told)],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            bufsize=0,
            pass_fds=[told],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": unbuffered},
        )
        answer.close()
        assert process.stdin is not None
        for line in (b"first\n", b"second\n", b"third\n"):
            filler = fill(small_disk) if line == b"second\n" else None
            process.stdin.write(line)
            assert answers.read(1) == b"."
            if filler is not None:
                filler.unlink()
        process.communicate()
    text = log.read_text()
    assert process.returncode == 0
    assert "\nfirst\n" in text and "\nsecond\n" not in text and text.endswith("\nthird\nthe end\n")
    assert "Traceback" not in text


def test_a_launch_whose_reader_goes_away_at_once_trains(
    small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    words = [str(word) for word in pretrain_command(small_file, "--run", "unread", "--stop-after", "3")]
    piped = start_process(["bash", "-c", f"set -o pipefail; {shlex.join(words)} | head -1"], tmp_path)
    assert piped.end()[0] == 0
    assert (tmp_path / "runs" / "unread" / "checkpoints" / "3").is_dir()
