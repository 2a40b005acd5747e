import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from processes import kill_all
from small_pretraining import StartProcess, pretrain_command
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from launch.cluster.agent import first_failure
from launch.cluster.local import launch_local, rank_environment
from launch.cluster.slurm import require_sbatch
from launch.cluster.threads import threads_per_rank, visible_gpus
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.machine import usable_cpus

LAUNCH = """
import sys
from pathlib import Path
from launch.cluster.local import launch_local
sys.exit(launch_local(sys.argv[3:], int(sys.argv[2]), Path(sys.argv[1]) / "logs", threads_per_rank=1, module="ranks"))
"""


class Launch:
    """A launcher in a process of its own, whose ranks run `program`."""

    def __init__(self, folder: Path, nproc: int, program: str) -> None:
        self.folder = folder
        (folder / "ranks.py").write_text("import os, sys\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(program))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(folder), str(nproc), "one", "--two=3"],
            env={**environment, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, *names: str) -> None:
        """Wait until the ranks have made these files."""
        end = time.monotonic() + 60
        while not all((self.folder / name).exists() for name in names):
            assert self.process.poll() is None and time.monotonic() < end
            time.sleep(0.02)

    def read_line(self) -> str:
        """Wait for a line of stdout."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def processes(self) -> tuple[psutil.Process, list[psutil.Process]]:
        """The process that starts the ranks, and the ranks."""
        (agent,) = psutil.Process(self.process.pid).children()
        return agent, agent.children()

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def kill(self) -> None:
        """End what a failed test has left: the launcher, torchrun and the ranks."""
        if self.process.poll() is None:
            launcher = psutil.Process(self.process.pid)
            kill_all([*launcher.children(recursive=True), launcher])
            self.process.communicate()


Launcher = Callable[[int, str], Launch]


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    """Start ranks of a program below `tmp_path`."""
    started: list[Launch] = []

    def start(nproc: int, program: str) -> Launch:
        started.append(Launch(tmp_path, nproc, program))
        return started[-1]

    yield start
    for launch in started:
        launch.kill()


PLAY = """
import sys
from pathlib import Path
from launch.cluster.local import launch_local
nodes, on_cpu = ("a", "b"), sys.argv[1] == "on the CPUs"
sys.exit(launch_local([], 4, Path("logs"), threads_per_rank=1, module="ranks", nodes=nodes, on_cpu=on_cpu))
"""


@pytest.mark.parametrize(
    ("where", "visible", "expected"),
    [
        ("on GPUs", None, ["0,1", "0,1", "2,3", "2,3"]),
        ("on GPUs", "7,5,GPU-c,1,0", ["7,5", "7,5", "GPU-c,1", "GPU-c,1"]),
        ("on the CPUs", "7,5,3,1", ["", "", "", ""]),
    ],
)
def test_nodes_that_a_machine_plays_share_its_gpus(
    where: str, visible: str | None, expected: list[str], tmp_path: Path
) -> None:
    ranks = "import os, pathlib\npathlib.Path(os.environ['RANK']).write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    (tmp_path / "ranks.py").write_text(ranks)
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    subprocess.run([sys.executable, "-c", PLAY, where], env=environment, cwd=tmp_path, check=True, timeout=120)
    assert [(tmp_path / str(rank)).read_text() for rank in range(4)] == expected


LISTEN = """
import pathlib, signal, time
asked = []
def note(*_):
    asked.append(True)
    pathlib.Path(f"asked-{rank}").touch()
signal.signal(signal.SIGTERM, note)
pathlib.Path(f"ready-{rank}").touch()
"""


def test_ranks_get_arguments_threads_and_a_safe_path_and_rank_0_has_the_terminal(
    launcher: Launcher, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise RuntimeError('the data folder of the working directory')")
    launch = launcher(
        2,
        """
        import data
        print(rank, os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"], sys.argv[1:], os.environ["MASTER_ADDR"])
        """,
    )
    # The folder that holds ranks.py comes on the path after ours, as a user's would.
    code, out, err = launch.end()
    assert (code, err) == (0, "")
    assert out == "0 2 1 ['one', '--two=3'] 127.0.0.1\n"
    (log,) = tmp_path.glob("logs/launch_*/attempt_0/1/stdout.log")
    assert log.read_text() == out.replace("0", "1", 1)


def test_a_users_mistake_ends_with_2_and_its_own_line_only(launcher: Launcher) -> None:
    launch = launcher(
        2,
        """
        import time
        if rank == 0:
            print("tokens: too few", file=sys.stderr)
            sys.exit(2)
        time.sleep(60)
        """,
    )
    assert launch.end() == (2, "", "tokens: too few\n")


def test_a_mistake_that_one_rank_alone_has_found_is_shown(launcher: Launcher) -> None:
    launch = launcher(
        2,
        """
        import time
        if rank == 1:
            print("error: shards: no such folder", file=sys.stderr)
            sys.exit(2)
        time.sleep(60)
        """,
    )
    assert launch.end() == (2, "", "error: shards: no such folder (rank 1 on this machine)\n")


def test_the_log_of_a_rank_that_failed_is_shown(launcher: Launcher) -> None:
    code, out, err = launcher(2, "import time; assert rank == 0, 'rank 1 is unwell'; time.sleep(60)").end()
    assert (code, out) == (1, "")
    assert "Training failed: rank 1" in err and "AssertionError: rank 1 is unwell" in err
    assert "ChildFailedError" not in err


def test_a_killed_rank_ends_the_launch_with_1(launcher: Launcher) -> None:
    code, _, err = launcher(1, "import signal; os.kill(os.getpid(), signal.SIGKILL)").end()
    assert code == 1 and re.fullmatch(r"Training failed: rank 0 \(process \d+\) was ended by SIGKILL\.\n", err)


def test_a_failure_began_where_a_rank_was_killed_not_where_others_lost_it() -> None:
    failures = {
        rank: ProcessFailure(local_rank=rank, pid=rank, exitcode=exitcode, error_file="")
        for rank, exitcode in ((0, 1), (1, -signal.SIGKILL), (2, -signal.SIGTERM))
    }
    assert first_failure(failures)[0] == 1


def test_ranks_that_torchs_watchdog_ends_with_nccl_have_lost_the_one_that_failed_before() -> None:
    failures = {}
    for rank, exitcode, failed_at in ((3, 1, 100), (5, -signal.SIGABRT, 101)):
        failures[rank] = ProcessFailure(local_rank=rank, pid=rank, exitcode=exitcode, error_file="")
        failures[rank].timestamp = failed_at
    assert first_failure(failures)[0] == 3
    failures[3].timestamp = 102
    assert first_failure(failures)[0] == 5, "an abort of its own, where nothing failed before"
    failures[7] = ProcessFailure(local_rank=7, pid=7, exitcode=-signal.SIGKILL, error_file="")
    failures[7].timestamp = 103
    assert first_failure(failures)[0] == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_reaches_every_rank_once_and_waits_for_the_save(
    launcher: Launcher, tmp_path: Path, number: signal.Signals
) -> None:
    launch = launcher(
        2,
        LISTEN
        + """
while not asked:
    time.sleep(0.02)
time.sleep(1.5)
pathlib.Path(f"saved-{rank}-after-{len(asked)}").touch()
""",
    )
    launch.wait_for("ready-0", "ready-1")
    launch.process.send_signal(number)
    launch.process.send_signal(number)  # as when a terminal and `make` both send it
    said = launch.read_line()
    assert not list(tmp_path.glob("saved-*")), "it is said at once"
    assert said.startswith(f"Stopping ({number.name}): the state after the step at hand is saved.")
    assert ("Ctrl-C again" in said) == (number == signal.SIGINT)
    assert launch.end() == (0, "", "")
    assert (tmp_path / "saved-0-after-1").exists() and (tmp_path / "saved-1-after-1").exists()


def test_a_second_ctrl_c_ends_ranks_that_do_not(launcher: Launcher) -> None:
    launch = launcher(2, LISTEN + "\nwhile True: time.sleep(1)\n")
    launch.wait_for("ready-0", "ready-1")
    launch.process.send_signal(signal.SIGINT)
    launch.wait_for("asked-0", "asked-1")
    time.sleep(1.3)
    launch.process.send_signal(signal.SIGINT)
    code, _, err = launch.end()
    assert code == 1 and "Ended at once, as asked; the run goes on from its newest checkpoint.\n" in err


SAVE_WHEN_ORPHANED = (
    LISTEN
    + """
from launch.cluster.parent_death import signal_when_parent_ends
signal_when_parent_ends(signal.SIGTERM, os.getppid())
pathlib.Path(f"bound-{rank}").touch()
while not asked:
    time.sleep(0.02)
time.sleep(0.5)
pathlib.Path(f"saved-{rank}").touch()
"""
)
"""What `launch.train` does under our launcher."""


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
@pytest.mark.parametrize("victim", ["launcher", "agent"])
def test_when_the_processes_above_are_killed_the_ranks_save_and_end(
    victim: str, launcher: Launcher, tmp_path: Path
) -> None:
    launch = launcher(2, SAVE_WHEN_ORPHANED)
    launch.wait_for("bound-0", "bound-1")
    agent, ranks = launch.processes()
    if victim == "agent":
        agent.kill()
        code, out, err = launch.end()
        assert (code, out) == (1, "")
        assert err.startswith(f"Training failed: process {agent.pid}, which started the ranks, was ended by SIGKILL; ")
    else:
        launch.process.kill()
        launch.process.wait()
    gone, alive = psutil.wait_procs([agent, *ranks], timeout=30)
    assert len(gone) == 3 and not alive
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()
    launch.process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
@pytest.mark.parametrize("seconds", [0.1, 1.0])
def test_ranks_that_have_not_met_yet_end_with_their_launcher(
    seconds: float, small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    """Then they wait for each other in torch's store, whose server is gone, where no handler of Python's is called."""
    launcher = start_process(pretrain_command(small_file, "--run", "mine"), tmp_path)
    end = time.monotonic() + 60
    while len(launcher.ranks()) < 2:
        assert launcher.is_running(), launcher.end()
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(seconds)
    ranks = launcher.ranks()
    launcher.send(signal.SIGKILL)
    assert len(ranks) == 2 and not psutil.wait_procs(ranks, timeout=20)[1]
    launcher.end(20)  # and nobody has its pipes


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_a_parent_that_is_gone_already_is_noticed() -> None:
    program = (
        "import signal; from launch.cluster.parent_death import signal_when_parent_ends as ask; ask(signal.SIGTERM, 1)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGTERM


def test_a_reader_that_goes_away_ends_no_launch(launcher: Launcher, tmp_path: Path) -> None:
    launch = launcher(1, LISTEN + "\nwhile not asked: time.sleep(0.02)\npathlib.Path('saved-0').touch()\n")
    launch.wait_for("ready-0")
    assert launch.process.stdout is not None
    launch.process.stdout.close()
    launch.process.send_signal(signal.SIGINT)
    assert launch.process.wait(60) == 0
    assert (tmp_path / "saved-0").exists()
    launch.process.stdout = None


def test_a_stop_before_there_are_ranks_ends_quietly(launcher: Launcher) -> None:
    launch = launcher(1, "import time; time.sleep(60)")
    while not psutil.Process(launch.process.pid).children():
        time.sleep(0.01)
    launch.process.send_signal(signal.SIGTERM)
    code, _, err = launch.end()
    assert code == 0 and err == "Stopped before training began.\n"


def test_what_the_user_set_wins() -> None:
    assert rank_environment({}, 2, 1)["OMP_NUM_THREADS"] == "1"
    assert rank_environment({"OMP_NUM_THREADS": "7"}, 2, 1)["OMP_NUM_THREADS"] == "7"
    assert "OMP_NUM_THREADS" not in rank_environment({}, 2, None)
    assert rank_environment({}, 999, 1)["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in rank_environment({}, 1, 1)
    assert rank_environment({}, 1, 1, deterministic=True)["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert rank_environment({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, 1, 1, True)["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in rank_environment({}, 1, 1)
    path = rank_environment({"PYTHONPATH": "mine"}, 1, 1)["PYTHONPATH"].split(os.pathsep)
    assert (Path(path[0]) / "launch" / "cluster").is_dir() and path[1] == "mine"


def test_ranks_on_the_cpus_of_a_machine_with_gpus_see_none_and_share_the_cores() -> None:
    seen = {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert rank_environment(seen, 2, 1, on_cpu=True)["CUDA_VISIBLE_DEVICES"] == ""
    assert rank_environment(seen, 2, 1)["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "CUDA_VISIBLE_DEVICES" not in rank_environment({}, 2, 1)
    recipe = load_recipe("tiny", ["general.cpu_ranks_per_node=1"]).recipe
    assert threads_per_rank(recipe, 1, on_cpu=True) == usable_cpus()


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 4), ("", 0), ("-1", 0), ("2", 1), ("0, 3", 2), ("0,-1,1", 1), ("0,,1", 1), ("0,1,2,3,4", 4)],
)
def test_gpus_are_counted_as_cuda_counts_them(visible: str | None, count: int) -> None:
    assert visible_gpus(4, visible) == count


def test_no_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 ranks"):
        launch_local([], 0, tmp_path)


def test_without_sbatch_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"sbatch is missing.*login node.*leave out --nodes"):
        require_sbatch()
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    require_sbatch()
