"""The parts of the guards alone: counting, spikes, checksums, copies, the clock."""

import subprocess
import sys
from functools import partial
from typing import Any

import guard_plants
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity_cases import grid
from small_pretraining import REPOSITORY

from launch.train.guards import RunFailed, SkippedSteps, SpikeDetector
from launch.train.parity import start_engine
from launch.train.replicas import ROW, ReplicaCheck, checksum
from launch.train.synthetic import synthetic_batch
from nanotron_recipes.overrides import apply_overrides
from parallel.rank_pool import RankPool


def test_only_skipped_steps_in_a_row_end_a_run() -> None:
    skipped = SkippedSteps(3, lambda step: [f"source-{step}"])
    for step in range(1, 20):
        skipped.observe(step, skipped=step % 3 != 0)
        skipped.check()
    for step in (20, 21):
        skipped.observe(step, skipped=True)
    with pytest.raises(RunFailed, match=r"step 19: source-19; step 20: source-20; step 21: source-21") as failure:
        skipped.check()
    assert (failure.value.kind, failure.value.step) == ("skipped_steps", 21)


def test_a_spike_is_what_lies_far_above_the_steps_before() -> None:
    detector = SpikeDetector(window=16, threshold=8.0)
    losses = [4.0 - 0.01 * step + 0.03 * (-1) ** step for step in range(1, 60)]
    assert [detector.observe(step, loss, "a") for step, loss in enumerate(losses, 1)] == [None] * len(losses)
    spike = detector.observe(60, 4.2, "a")
    assert spike is not None and (spike["event"], spike["step"], spike["spike_loss"]) == ("spike", 60, 4.2)
    assert spike["median"] < spike["limit"] < 4.2
    assert detector.observe(61, 1.0, "a") is None, "a fall is none"
    assert detector.observe(62, float("nan"), "a") is None
    assert detector.observe(63, 9.0, "b") is None, "another stage has another loss"


def test_no_window_no_spikes() -> None:
    detector = SpikeDetector(window=0, threshold=8.0)
    assert all(detector.observe(step, loss, "a") is None for step, loss in enumerate([1.0] * 50 + [99.0], 1))


@given(st.integers(1, 3 * ROW), st.booleans(), st.data())
def test_any_flipped_bit_changes_the_checksum(numel: int, is_bfloat16: bool, data: st.DataObject) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    values = values.bfloat16() if is_bfloat16 else values
    before = checksum(values)
    bits = values.view(torch.int16 if is_bfloat16 else torch.int32)
    bit = data.draw(st.integers(0, 15 if is_bfloat16 else 31))
    highest = torch.iinfo(bits.dtype).min if bit == torch.iinfo(bits.dtype).bits - 1 else 1 << bit
    bits[data.draw(st.integers(0, numel - 1))] ^= highest
    assert checksum(values) != before


def flip_on_rank(mapping: dict[str, object], flips: dict[int, str]) -> tuple[list[str], list[str], int]:
    """(what differs after a step, what differs after this rank's parameter is changed, number of copies)."""
    engine = start_engine(mapping)
    engine.train_step(synthetic_batch(engine.recipe, engine.topology, 1, engine.context.dp_rank), 1e-3)
    check = ReplicaCheck(engine.built.buckets, engine.context)
    before = check.differences()
    for bucket in engine.built.buckets:
        for slot in bucket.slots:
            if slot.name == flips.get(engine.context.rank):
                guard_plants.flip_lowest_bit(slot.view(bucket.parameters))
    after = check.differences()
    engine.context.destroy()
    return list(map(str, before)), list(map(str, after)), check.num_shared


EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
NORM = "model.decoder.0.pp_block.input_layernorm.weight"


@pytest.mark.parametrize(
    ("overlay", "flips", "found"),
    [
        (grid(dp=3, zero=1), {1: NORM}, [f"{NORM} (ranks 0, 2 ≠ rank 1)"]),
        ((*grid(dp=2), "model.dtype=bfloat16"), {1: NORM}, [f"{NORM} (rank 0 ≠ rank 1)"]),
        (grid(tp=2), {0: NORM}, [f"{NORM} (rank 0 ≠ rank 1)"]),
        # ranks: stage · 4 + replica · 2 + tensor rank; the embedding's shards are tied between the stages
        (grid(dp=2, pp=2, tp=2), {5: EMBEDDING}, [f"{EMBEDDING} (ranks 1, 3, 7 ≠ rank 5)"]),
    ],
    ids=str,
)
def test_the_ranks_whose_copy_differs_are_named(
    overlay: tuple[str, ...], flips: dict[int, str], found: list[str], pool: RankPool, base_recipe: dict[str, Any]
) -> None:
    mapping, _ = apply_overrides(base_recipe, overlay)
    parallelism = mapping["parallelism"]
    ranks = parallelism["dp"] * parallelism["pp"] * parallelism["tp"]
    results = pool.run(ranks, partial(flip_on_rank, flips=flips), mapping)
    assert all(result == results[0] for result in results)
    before, after, num_shared = results[0]
    assert (before, after) == ([], found) and num_shared > 0


SLEEPER = """
import sys, time
from launch.train.watchdog import Watchdog
with Watchdog(float(sys.argv[1]), rank=3) as watchdog:
    with watchdog.watch("a nap"):
        {body}
    print("awake")
"""


@pytest.mark.parametrize(
    ("seconds", "body", "code", "said"),
    [
        (60, "pass", 0, ""),
        (0.2, "time.sleep(30)", 1, "error: rank 3: a nap took more than 0.2 s"),
        # sum() holds the interpreter's lock: no thread of Python runs
        (0.2, "sys.setswitchinterval(1000); sum(range(10**11))", 1, "Timeout (0:00:00.6"),
    ],
    ids=["in time", "asleep", "holding the lock"],
)
def test_the_watchdog_ends_what_takes_too_long(seconds: float, body: str, code: int, said: str) -> None:
    command = [sys.executable, "-c", SLEEPER.format(body=body), str(seconds)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and said in done.stderr
    assert ("most recent call first" in done.stderr) == (code == 1) and ("awake" in done.stdout) == (code == 0)
