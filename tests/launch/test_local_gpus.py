"""How many ranks start on the GPUs of this machine; no GPU is needed to count them."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli.main import main
from launch.cluster import threads
from launch.train import rank
from launch.train.signals import StopRequest


def started(
    arguments: list[str],
    gpus: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    *,
    is_tokenized: bool = False,
) -> str:
    """What `pretrain` says on a machine with so many GPUs, up to the text, which is out of reach here."""
    monkeypatch.setattr(threads, "gpus_here", lambda: gpus)
    monkeypatch.setattr("launch.cli.pretrain.ensure_tokens", lambda *_: is_tokenized)
    monkeypatch.setattr(sys, "argv", ["nanotron-recipes", "pretrain", "tiny", *arguments])
    with pytest.raises(SystemExit):
        main()
    captured = capfd.readouterr()
    return captured.out + captured.err


@pytest.mark.parametrize(
    ("files", "gpus"),
    [([], 0), (["dev/nvidiactl"], 0), (["dev/nvidiactl", "dev/nvidia0"], 2), (["usr/bin/nvidia-modprobe"], 2)],
)
def test_the_gpus_of_a_host_are_not_those_of_a_container_that_was_given_none(
    files: list[str], gpus: int, tmp_path: Path
) -> None:
    for name in ["proc/driver/nvidia/gpus/0000:17:00.0", "proc/driver/nvidia/gpus/0000:65:00.0", *files]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert threads.present_gpus(tmp_path) == gpus


@pytest.mark.parametrize(("gpus", "used"), [(8, 6), (7, 6), (5, 4)])
def test_gpus_that_the_batch_does_not_divide_into_stay_idle_and_are_named(
    gpus: int, used: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said = started([], gpus, monkeypatch, capfd)
    assert f"note: {used} of the {gpus} GPUs here are used; on all of them: tokens.global_batch_size: 12" in said
    assert f"expected a multiple of dp {gpus}" in said
    assert "GPUs here" not in started([], 6, monkeypatch, capfd)


def test_ranks_that_were_asked_for_are_not_fewer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said = started(["--gpus-per-node", "8"], 8, monkeypatch, capfd)
    assert said.startswith("error: tokens.global_batch_size: 12: expected a multiple of dp 8")


@pytest.mark.parametrize(
    ("arguments", "gpus", "ranks"),
    [
        (["--set", "parallelism.tp=2"], 1, 2),
        (["--set", "parallelism.dp=4"], 2, 4),
        (["--gpus-per-node", "2"], 1, 2),
        (["--launcher", "local", "--nodes", "2"], 2, 4),
    ],
)
def test_more_ranks_than_gpus_are_refused_before_anything_is_tokenized(
    arguments: list[str], gpus: int, ranks: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said = started(arguments, gpus, monkeypatch, capfd)
    assert said.splitlines() == [
        f"error: parallelism: dp × pp × tp is {ranks} ranks; expected at most {gpus} on this machine, one for each of "
        "its GPUs, or --gpus-per-node 0 (on its CPUs)"
    ]


@pytest.mark.parametrize(
    ("arguments", "gpus", "number", "on_cpu"),
    [
        ([], 2, 2, False),
        (["--gpus-per-node", "0", "--set", "parallelism.tp=2"], 1, 2, True),
        (["--gpus-per-node", "1"], 0, 1, False),  # GPUs of another maker, or under WSL2: who asks for them has them
        ([], 0, 2, True),
    ],
)
def test_launcher_and_ranks_agree_on_what_they_compute_with(
    arguments: list[str],
    gpus: int,
    number: int,
    on_cpu: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    chosen = []

    def train(loaded: object, run: object, ranks: Any, *_: object) -> int:
        chosen.append((ranks.number, ranks.on_cpu))
        return 0

    monkeypatch.setattr("launch.cli.pretrain._train", train)
    monkeypatch.setattr("launch.cli.pretrain.ensure_staged", lambda *_: None)
    started(arguments, gpus, monkeypatch, capfd, is_tokenized=True)
    assert chosen == [(number, on_cpu)]


@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        (RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nUpdate it"), "11040)."),
        (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA enabled"),
        (None, "no GPU is found"),
    ],
)
def test_a_rank_beside_gpus_that_torch_cannot_use_says_why(
    failure: Exception | None, cause: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def init() -> None:
        if failure is not None:
            raise failure

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(rank, "gpus_here", lambda: 8)
    monkeypatch.setattr(rank, "init_process_group", lambda device: pytest.fail("the ranks met"))
    assert rank.train(Namespace(local_rank=0), StopRequest()) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: GPUs here: 8; torch {torch.__version__} can use none of them: ")
    assert f"{cause}; expected" in line
    assert "--gpus-per-node 0, slurm.gpus_per_node: 0, or an empty CUDA_VISIBLE_DEVICES" in line


def test_a_rank_that_is_shown_no_gpu_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--gpus-per-node 0` starts it, on a machine of any kind; and as torchrun does on one without GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(rank, "init_process_group", lambda device: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert rank._join_world(0) == torch.device("cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(threads, "present_gpus", lambda root: 0)
    assert rank._join_world(0) == torch.device("cpu")
