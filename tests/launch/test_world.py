"""A rank that is started in the wrong way says so in one line, before it imports torch or makes a folder."""

import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from small_pretraining import REPOSITORY

from launch.train.arguments import Parser, step_number
from launch.train.signals import StopRequest
from launch.train.world import World, check_connections
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe

RIGHT = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_a_rank_finds_its_place() -> None:
    assert World.described_by(RIGHT) == World(1, 4, 1)
    assert World.described_by({**RIGHT, "LOCAL_RANK": "0"}) == World(1, 4, 0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"RANK": None}, "RANK and WORLD_SIZE are not set; start ranks with: torchrun"),
        ({"RANK": "one"}, "RANK: 'one': expected a number from 0 to 3"),
        ({"RANK": "4"}, "RANK: '4': expected a number from 0 to 3"),
        ({"RANK": "-1"}, "RANK: '-1'"),
        ({"RANK": "²"}, "RANK: '²'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0': expected a number from 1"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: ''"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: "),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: 'x'"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: '70000': expected a number from 1 to 65535"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "no such host"}, "MASTER_ADDR: 'no such host': "),
        ({"MASTER_ADDR": "a" * 300}, "MASTER_ADDR: 'aaa"),
    ],
)
def test_a_world_that_cannot_be_is_named(change: dict[str, str | None], expected: str) -> None:
    environment = {name: value for name, value in {**RIGHT, **change}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        World.described_by(environment)
    assert str(caught.value).startswith(expected) and len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "²", "9" * 30])
def test_a_step_is_from_1_on(text: str) -> None:
    parser = Parser(prog="launch.train")
    parser.add_argument("--stop-after", type=step_number)
    with pytest.raises(UserError, match=r"--stop-after: .*expected a step, from 1 on; see `python -m launch\.train"):
        parser.parse_args([f"--stop-after={text}"])
    assert parser.parse_args(["--stop-after", "7"]).stop_after == 7


OVERLAPPING = ["parallelism.tp=2", "parallelism.tp_linear_async_communication=true"]


def test_ranks_that_overlap_communication_have_one_connection_or_are_told_so() -> None:
    scattered = load_recipe("tiny", [*OVERLAPPING, "parallelism.tp_mode=REDUCE_SCATTER"]).recipe
    check_connections(scattered, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    with pytest.raises(UserError) as caught:
        check_connections(scattered, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"})
    assert str(caught.value) == (
        "CUDA_DEVICE_MAX_CONNECTIONS: '8': expected 1, or no such variable, with parallelism.tp 2 and "
        "parallelism.tp_linear_async_communication: true"
    )
    for other in ("parallelism.tp=1", "parallelism.tp_linear_async_communication=false"):
        recipe = load_recipe("tiny", [*OVERLAPPING, "parallelism.tp_mode=REDUCE_SCATTER", other]).recipe
        check_connections(recipe, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"})


@pytest.mark.parametrize("exported", [None, "8"])
def test_a_rank_that_is_started_by_hand_has_one_connection_before_torch_is_imported(exported: str | None) -> None:
    program = (
        "import os, sys, types; from launch.train import __main__ as entry\n"
        "entry._check = lambda arguments: None\n"
        "say = lambda *_: print(os.environ['CUDA_DEVICE_MAX_CONNECTIONS'], 'torch' in sys.modules)\n"
        "sys.modules['launch.train.rank'] = types.SimpleNamespace(train=say)\n"
        "sys.argv = ['launch.train', 'tiny']; entry.main()"
    )
    variables = {} if exported is None else {"CUDA_DEVICE_MAX_CONNECTIONS": exported}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == (f"{exported or 1} False\n", "")


def call(*command: str, **variables: str) -> tuple[int, str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("command", "variables", "expected"),
    [
        (["launch.train"], RIGHT | {"RANK": "0"}, "the following arguments are required: RECIPE"),
        (
            ["launch.train", "tiny", "--stop-after", "0"],
            RIGHT | {"RANK": "0"},
            "argument --stop-after: 0: expected a step",
        ),
        (["launch.train", "tiny", "--stop", "x"], {}, "argument --stop-after: x: expected a step"),
        (["launch.train", "tiny"], RIGHT | {"WORLD_SIZE": "x"}, None),
        (["launch.train", "tiny"], RIGHT | {"RANK": "0", "WORLD_SIZE": "x"}, "WORLD_SIZE: 'x'"),
        (
            ["launch.train", "tiny", *(word for change in OVERLAPPING for word in ("--set", change))],
            RIGHT | {"RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "8"},
            "CUDA_DEVICE_MAX_CONNECTIONS: '8': expected 1",
        ),
        (["launch.train", "/proc/self/mem"], RIGHT | {"RANK": "0"}, "/proc/self/mem: cannot be read"),
        (["launch.train.loss_plot"], {}, "the following arguments are required: metrics, out"),
        (["launch.train.loss_plot", "nowhere.jsonl", "out.png"], {}, "nowhere.jsonl: No such file or directory"),
        (["launch.train.loss_plot", "/", "out.png"], {}, "/: Is a directory"),
    ],
)
def test_a_wrong_call_is_one_line(command: list[str], variables: dict[str, str], expected: str | None) -> None:
    code, out, err = call(*command, **variables)
    assert (code, out) == (2, "")
    if expected is None:
        assert err == [], "the first rank speaks for all"
    else:
        (line,) = err
        assert line.startswith(f"error: {expected}")


def test_an_error_of_the_file_system_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from launch.train import rank

    def fail(*arguments: object) -> int:
        Path("/nowhere/at/all").read_text()
        return 0

    monkeypatch.setattr(rank, "_train", fail)
    with StopRequest() as stop:
        assert rank.train(Namespace(), stop) == 1
    assert capsys.readouterr().err == "error: /nowhere/at/all: No such file or directory\n"


@pytest.mark.parametrize(("number", "is_asked", "said"), [(0, False, 1), (0, True, 1), (1, False, 1), (1, True, 0)])
def test_a_mistake_that_all_ranks_find_is_told_by_the_first(
    number: int, is_asked: bool, said: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from launch.train import rank

    monkeypatch.setattr(rank.torch_dist, "is_initialized", lambda: True)
    monkeypatch.setattr(rank.torch_dist, "get_rank", lambda: number)
    monkeypatch.setattr(rank.torch_dist, "destroy_process_group", lambda: None)
    with StopRequest() as stop:
        monkeypatch.setattr(rank.time, "sleep", lambda seconds: is_asked and os.kill(os.getpid(), signal.SIGTERM))
        assert rank._refuse("shards: no such folder", stop) == 2
    assert capsys.readouterr().err == "error: shards: no such folder\n" * said


def test_what_is_told_is_why_the_training_failed_not_that_a_file_did_not_close_either() -> None:
    from launch.train import rank

    class Full:
        def close(self) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), rank._closing(Full()):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="the reason"), rank._closing(Full()):  # type: ignore[arg-type]
        raise ValueError("the reason")


@pytest.mark.parametrize(
    ("launch_id", "job_launch", "code"), [(None, None, 2), ("launch", None, 1), (None, "slurm-7.0", 1)]
)
def test_a_meeting_place_where_nobody_is_ends_in_one_line_and_is_no_mistake_where_our_launcher_chose_it(
    launch_id: str | None, job_launch: str | None, code: int
) -> None:
    variables = RIGHT | {"MASTER_PORT": "1", "TORCH_CPP_LOG_LEVEL": "FATAL", "WORLD_SIZE": "2"}
    program = (
        "import sys; from datetime import timedelta; from launch.train import rank\n"
        "meet = rank.init_process_group\n"
        "rank.init_process_group = lambda device: meet(device, timedelta(seconds=1))\n"
        "from argparse import Namespace\n"
        f"sys.exit(rank.train(Namespace(local_rank=0, launch_id={launch_id!r}, job_launch={job_launch!r}), None))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith(
        "error: the ranks did not meet at MASTER_ADDR:MASTER_PORT 127.0.0.1:1: "
    )
    assert "Traceback" not in done.stderr
