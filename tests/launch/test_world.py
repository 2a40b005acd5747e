"""A rank that is started in the wrong way says so in one line, before it imports torch or makes a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_pretraining import REPOSITORY

from launch.train.arguments import Parser, step_number
from launch.train.world import World
from nanotron_recipes.errors import UserError

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


def test_a_meeting_place_where_nobody_is_ends_in_one_line(tmp_path: Path) -> None:
    variables = RIGHT | {"MASTER_PORT": "1", "TORCH_CPP_LOG_LEVEL": "FATAL", "WORLD_SIZE": "2"}
    program = (
        "import sys; from datetime import timedelta; from launch.train import rank\n"
        "meet = rank.init_process_group\n"
        "rank.init_process_group = lambda device: meet(device, timedelta(seconds=1))\n"
        "from argparse import Namespace\n"
        "sys.exit(rank.train(Namespace(local_rank=0), None))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: the ranks did not meet at MASTER_ADDR:MASTER_PORT 127.0.0.1:1: "
    )
    assert "Traceback" not in done.stderr
