"""The README's first command, whole and unchanged, and what it must reach (`make test-tiny`, about four minutes)."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from data.manifest import read_manifest
from launch.train.metrics import Metrics, read_metrics

pytestmark = [pytest.mark.tiny, pytest.mark.timeout(1500)]

SOURCES = ("prose", "code", "maths")
MIN_ARITHMETIC = 0.80


def pretrain(folder: Path, *arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("nanotron-recipes")), "pretrain", "tiny", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def transcript(folder: Path) -> str:
    return pretrain(folder)


@pytest.fixture(scope="module")
def metrics(folder: Path, transcript: str) -> Metrics:
    return read_metrics(folder / "runs/tiny-1/metrics.jsonl")


def test_it_says_what_it_reached_and_where_everything_is(transcript: str, folder: Path) -> None:
    print(transcript)
    for words in ("Validation loss", "Samples", "arithmetic:", "runs/tiny-1", "tensorboard --logdir", "next:"):
        assert words in transcript
    for path in ("export/model.safetensors", "tensorboard", "loss.png", "recipe.yaml"):
        assert (folder / "runs/tiny-1" / path).exists(), path


@pytest.mark.parametrize("source", SOURCES)
def test_it_beats_a_bigram_model_of_the_same_tokens(source: str, folder: Path, metrics: Metrics) -> None:
    losses = [event["validation_loss"][source] for event in metrics.events if event["event"] == "validation"]
    bigram = [event for event in metrics.events if event["event"] == "evaluation"][-1]["bigram_bits_per_byte"][source]
    bytes_per_token = read_manifest(folder / "corpora/tiny" / source).validation.bytes_per_token
    assert bytes_per_token is not None
    bits = losses[-1] / math.log(2) / bytes_per_token
    assert bits < bigram < losses[0] / math.log(2) / bytes_per_token, f"{source}: {bits:.3f}, bigram {bigram:.3f}"


def test_it_adds_and_subtracts_problems_it_never_saw(metrics: Metrics) -> None:
    arithmetic = [event for event in metrics.events if event["event"] == "evaluation"][-1]["arithmetic"]
    assert arithmetic["total"] == 400
    assert arithmetic["correct"] / arithmetic["total"] >= MIN_ARITHMETIC, arithmetic


def test_the_model_card_says_so(folder: Path, transcript: str) -> None:
    card = (folder / "runs/tiny-1/export/README.md").read_text()
    assert "bigram" in card and "Of 400 two-digit sums and differences" in card
    assert all(source in card for source in SOURCES)


def test_a_second_call_starts_the_next_run_and_tokenizes_nothing_again(folder: Path, transcript: str) -> None:
    manifest = folder / "corpora/tiny/prose/manifest.json"
    before = manifest.stat().st_mtime_ns
    pretrain(folder, "--stop-after", "2")
    assert [step.step for step in read_metrics(folder / "runs/tiny-2/metrics.jsonl").steps] == [1, 2]
    assert manifest.stat().st_mtime_ns == before
