"""How many ranks start on the GPUs of this machine; no GPU is needed to count them."""

import sys

import pytest

from launch.cli.main import main
from launch.cluster import threads


def started(arguments: list[str], gpus: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """What `pretrain` says on a machine with so many GPUs, up to the text, which is out of reach here."""
    monkeypatch.setattr(threads, "gpus_here", lambda: gpus)
    monkeypatch.setattr("launch.cli.pretrain.ensure_tokens", lambda *_: False)
    monkeypatch.setattr(sys, "argv", ["nanotron-recipes", "pretrain", "tiny", *arguments])
    with pytest.raises(SystemExit):
        main()
    captured = capfd.readouterr()
    return captured.out + captured.err


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
