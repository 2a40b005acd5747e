import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty_disks import FULL, fill, read_only, wait_until

from launch.train import holder as holders
from launch.train.holder import GONE_AFTER_SECONDS, Holder
from launch.train.run_lock import HOLDER_FILE, RunIsTrained, RunLock, holder_of, new_launch_id
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
print("ready", flush=True)
sys.stdin.readline()
try:
    RunLock.acquire(Path(sys.argv[1]), sys.argv[2])
    print("held", flush=True)
except RunIsTrained:
    print("refused", flush=True)
sys.stdin.readline()
"""
RANK_OF_A_LAUNCH = """
import sys
from pathlib import Path
from launch.train.run_lock import RunLock
lock = RunLock.acquire(Path(sys.argv[1]), "launch")
print("held", flush=True)
sys.stdin.readline()
lock.release()
"""
ON_NODE = """
import socket, sys
from launch.train import holder
node = sys.argv[3]
socket.gethostname = lambda: node.partition("/")[0]
holder._boot_id = lambda: node
holder.HEARTBEAT_SECONDS, holder.GONE_AFTER_SECONDS = 0.05, 2.0
"""
"""A process sees itself on the machine `<host name>/<boot>`, in a hurry."""
SILENT_TOO_LONG = 2.5


def start(program: str, folder: Path, launch_id: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(folder), launch_id, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write_holder(folder: Path, **changes: str) -> Holder:
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
        assert [read_line(taker) for taker in takers] == ["ready"] * 6
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


def grow_silent(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder / HOLDER_FILE, (then, then))


def test_rank_0_gives_the_run_back_to_its_launcher(tmp_path: Path) -> None:
    launch = new_launch_id()
    program = HOLD.replace("RunLock.acquire(", "lock = RunLock.acquire(").replace("time.sleep(60)", "lock.release()")
    with RunLock.acquire(tmp_path, launch) as launcher:
        rank = start(program, tmp_path, launch)
        out, _ = rank.communicate()
        assert out == "held\n" and holder_of(tmp_path) == launcher.holder
        with pytest.raises(RunIsTrained):
            RunLock.acquire(tmp_path, "another")
    assert not (tmp_path / HOLDER_FILE).exists()


def test_a_process_that_takes_its_own_run_again_leaves_nothing(tmp_path: Path) -> None:
    RunLock.acquire(tmp_path, "first")
    with RunLock.acquire(tmp_path, "first"):
        pass
    assert not (tmp_path / HOLDER_FILE).exists()


@pytest.mark.parametrize(
    "changes", [{"host": "node-7", "boot_id": "another"}, {"boot_id": "another"}, {"pid_namespace": "pid:[1]"}]
)
def test_a_holder_that_cannot_be_looked_for_is_gone_when_its_heartbeat_stops(
    changes: dict[str, str], tmp_path: Path
) -> None:
    """On another machine, on one of the same name (or the same one before a restart), in another container."""
    holder = write_holder(tmp_path, start_time="1", **changes)
    grow_silent(tmp_path, GONE_AFTER_SECONDS - 20)
    said = rf"on {holder.host} .* sign of life is 28\d s old, and after 300 s it counts as gone; .*{HOLDER_FILE}"
    with pytest.raises(RunIsTrained, match=said):
        RunLock.acquire(tmp_path, "mine")
    grow_silent(tmp_path, GONE_AFTER_SECONDS + 20)
    with RunLock.acquire(tmp_path, "mine") as lock:
        assert holder_of(tmp_path) == lock.holder


def test_a_reused_process_id_is_another_process(tmp_path: Path) -> None:
    write_holder(tmp_path, start_time="1")
    assert holder_of(tmp_path) is None
    write_holder(tmp_path)
    grow_silent(tmp_path, 10 * GONE_AFTER_SECONDS)
    assert holder_of(tmp_path) is not None, "it is seen to run: its heartbeat does not matter"


def test_of_two_nodes_one_trains_until_its_heartbeat_stops(tmp_path: Path) -> None:
    first = start(ON_NODE + HOLD, tmp_path, "first", "node-a/boot-a")
    try:
        assert read_line(first) == "held"
        second = contend(tmp_path, "second", "node-b/boot-b")
        same_name = contend(tmp_path, "third", "node-a/boot-c")
        fourth = contend(tmp_path, "fourth", "node-b/boot-b")
        time.sleep(SILENT_TOO_LONG)
        assert answers(second, same_name) == ["refused", "refused"]
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert answers(fourth) == ["refused"], "it may be alive, for all we know"
        time.sleep(SILENT_TOO_LONG)
        assert answers(contend(tmp_path, "fifth", "node-b/boot-b")) == ["held"]
    finally:
        first.kill()
        first.communicate()


def test_a_holder_that_was_only_asleep_ends_when_its_run_was_taken_over(tmp_path: Path) -> None:
    sleeper = start(ON_NODE + HOLD, tmp_path, "first", "node-a/boot-a")
    try:
        assert read_line(sleeper) == "held"
        sleeper.send_signal(signal.SIGSTOP)
        time.sleep(SILENT_TOO_LONG)
        follower = start(ON_NODE + HOLD, tmp_path, "second", "node-b/boot-b")
        try:
            assert read_line(follower) == "held"
            sleeper.send_signal(signal.SIGCONT)
            _, said = sleeper.communicate(timeout=20)
            assert sleeper.returncode == 1
            assert "on node-b trains this run" in said and "took it over from this process" in said
            time.sleep(0.2)
            assert follower.poll() is None
        finally:
            follower.kill()
            follower.communicate()
    finally:
        sleeper.kill()
        sleeper.communicate()


def contend(folder: Path, launch_id: str, node: str) -> subprocess.Popen[str]:
    """A process on a node that waits until it is asked for its answer, and then tries to take the run."""
    taker = start(ON_NODE + CONTEND, folder, launch_id, node)
    assert read_line(taker) == "ready"
    return taker


def answers(*takers: subprocess.Popen[str]) -> list[str]:
    """What they got; they end."""
    found = []
    for taker in takers:
        out, _ = taker.communicate("go\n\n")
        found.append(out.strip())
    return found


@pytest.mark.parametrize("content", ["[]", "", "{}", "[" * 100_000, '{"pid": "1"}'])
def test_a_holder_file_that_is_not_ours_is_reported(content: str, tmp_path: Path) -> None:
    (tmp_path / HOLDER_FILE).write_text(content)
    with pytest.raises(UserError, match=HOLDER_FILE):
        RunLock.acquire(tmp_path, "mine")


def test_a_heartbeat_that_fails_is_said_and_ends_nothing(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(holders, "HEARTBEAT_SECONDS", 0.01)
    said: list[str] = []

    def lines() -> list[str]:
        said.extend(capsys.readouterr().err.splitlines())
        return said

    lock = RunLock.acquire(small_disk, "mine")
    with read_only(small_disk):
        wait_until(lambda: len(lines()) == 1)
        time.sleep(0.1)
    wait_until(lambda: len(lines()) == 2)
    assert holder_of(small_disk) == lock.holder
    with read_only(small_disk):
        lock.release()
    beat = f"heartbeat in {small_disk / HOLDER_FILE}: "
    assert lines() == [
        f"{beat}Read-only file system; training goes on while no other launch takes the run",
        f"{beat}it beats again",
        f"the run could not be given back: {small_disk / '.holder.lock'}: cannot be opened (Read-only file system)",
    ]


def test_a_rank_that_cannot_give_the_run_back_says_so_and_its_launcher_ends_as_ever(small_disk: Path) -> None:
    with RunLock.acquire(small_disk, "launch"):
        command = [sys.executable, "-c", RANK_OF_A_LAUNCH, str(small_disk)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        fill(small_disk)
        _, err = process.communicate("\n")
        assert process.returncode == 0
        assert err == f"the run could not be given back: {small_disk / HOLDER_FILE}: cannot be written ({FULL})\n"
    assert not (small_disk / HOLDER_FILE).exists()
