import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.train.run_lock import HOLDER_FILE, Holder, RunIsTrained, RunLock, holder_of, new_launch_id
from nanotron_recipes.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from launch.train.run_lock import RunLock
RunLock.acquire(Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
time.sleep(60)
"""
CONTEND = """
import sys, time
from pathlib import Path
from launch.train.run_lock import RunIsTrained, RunLock
sys.stdin.readline()
try:
    RunLock.acquire(Path(sys.argv[1]), sys.argv[2])
    print("held", flush=True)
except RunIsTrained:
    print("refused", flush=True)
sys.stdin.readline()
"""


def start(program: str, folder: Path, launch_id: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(folder), launch_id]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write_holder(folder: Path, **changes: object) -> Holder:
    holder = dataclasses.replace(Holder.this_process("other"), **changes)  # type: ignore[arg-type]
    (folder / HOLDER_FILE).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def test_a_second_launch_is_refused_by_name_and_a_killed_holder_is_followed(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path, "first")
    try:
        assert read_line(holder) == "held"
        with pytest.raises(RunIsTrained, match=rf"process {holder.pid} on .* trains this run since .*; wait for it"):
            RunLock.acquire(tmp_path, "second")
        assert issubclass(RunIsTrained, UserError)
        # Killed and not reaped, it is still in the process table.
        holder.send_signal(signal.SIGKILL)
        while holder_of(tmp_path) is not None:
            time.sleep(0.01)
        assert holder.returncode is None
        with RunLock.acquire(tmp_path, "second"):
            current = holder_of(tmp_path)
            assert current is not None and current.launch_id == "second"
        assert holder_of(tmp_path) is None
    finally:
        holder.kill()
        holder.communicate()


def test_of_many_simultaneous_takers_of_a_dead_holders_run_one_gets_it(tmp_path: Path) -> None:
    write_holder(tmp_path, start_time="1")
    takers = [start(CONTEND, tmp_path, f"launch-{number}") for number in range(6)]
    try:
        for taker in takers:
            assert taker.stdin is not None
            taker.stdin.write("go\n")
            taker.stdin.flush()
        answers = [read_line(taker) for taker in takers]
        assert sorted(answers) == ["held"] + ["refused"] * 5
    finally:
        for taker in takers:
            taker.kill()
            taker.communicate()


def test_rank_0_takes_over_from_its_own_launcher_and_the_launcher_does_not_take_it_away(tmp_path: Path) -> None:
    launch = new_launch_id()
    launcher = RunLock.acquire(tmp_path, launch)
    rank = start(HOLD, tmp_path, launch)
    try:
        assert read_line(rank) == "held"
        launcher.release()
        current = holder_of(tmp_path)
        assert current is not None and current.pid == rank.pid
    finally:
        rank.kill()
        rank.communicate()
    launcher.release()
    assert not (tmp_path / HOLDER_FILE).exists()


def test_a_holder_on_another_machine_is_never_provably_gone(tmp_path: Path) -> None:
    write_holder(tmp_path, host="node-7", boot_id="another", start_time="1")
    with pytest.raises(
        RunIsTrained, match=rf"on node-7 .* cannot be checked from here; if it is gone, remove .*{HOLDER_FILE}"
    ):
        RunLock.acquire(tmp_path, "mine")


def test_a_holder_in_another_container_is_never_provably_gone(tmp_path: Path) -> None:
    assert not write_holder(tmp_path, pid_namespace="pid:[1]", start_time="1").is_provably_gone()


def test_a_holder_from_before_a_reboot_and_a_reused_process_id_are_gone(tmp_path: Path) -> None:
    assert write_holder(tmp_path, boot_id="before").is_provably_gone()
    assert write_holder(tmp_path, start_time="1").is_provably_gone()
    assert not write_holder(tmp_path).is_provably_gone()


def test_a_holder_file_that_is_not_ours_is_reported(tmp_path: Path) -> None:
    (tmp_path / HOLDER_FILE).write_text("[]")
    with pytest.raises(UserError, match=HOLDER_FILE):
        RunLock.acquire(tmp_path, "mine")
