import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_data import random_documents, recipe_with, write_source

from data.batch import MicroBatch, micro_batch_from_windows
from data.bigram import Bigram, bigram_baseline, steps_to_count
from data.plan import DataPlan

VOCAB = 7


def random_batch(seed: int) -> MicroBatch:
    generator = np.random.default_rng(seed)
    tokens = np.minimum(generator.geometric(0.3, (4, 30)), VOCAB - 1).astype(np.int64)
    return micro_batch_from_windows(tokens, generator.random((4, 30)) < 0.1, restart_positions=True)


def pairs_of(batch: MicroBatch) -> list[tuple[int, int]]:
    mask = batch.target_mask
    return list(zip(batch.input_ids[mask].tolist(), batch.target_ids[mask].tolist(), strict=True))


def witten_bell(pairs: list[tuple[int, int]], previous: int, following: int) -> float:
    """The formula, counted the slow way."""
    pair_counts, unigrams = Counter(pairs), Counter(b for _, b in pairs)
    unigram = (unigrams[following] + len(unigrams) / VOCAB) / (len(pairs) + len(unigrams))
    seen = sum(count for (a, _), count in pair_counts.items() if a == previous)
    kinds = sum(a == previous for a, _ in pair_counts)
    return (pair_counts[previous, following] + kinds * unigram) / (seen + kinds) if seen else unigram


def test_probabilities_are_witten_bells() -> None:
    batches = [random_batch(1), random_batch(2)]
    bigram = Bigram.count(batches, VOCAB)
    pairs = [pair for batch in batches for pair in pairs_of(batch)]
    held_out = random_batch(3)
    expected = [-math.log(witten_bell(pairs, *pair)) for pair in pairs_of(held_out)]
    assert bigram.nats_per_token([held_out]) == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_probabilities_sum_to_one_after_every_token() -> None:
    bigram = Bigram.count([random_batch(1)], VOCAB)
    for previous in range(VOCAB):
        tokens = np.array([[previous, following] for following in range(VOCAB)], dtype=np.int64)
        nats = [
            bigram.nats_per_token(
                [micro_batch_from_windows(row[None], np.zeros((1, 2), dtype=np.bool_), restart_positions=False)]
            )
            for row in tokens
        ]
        assert sum(math.exp(-value) for value in nats) == pytest.approx(1.0)


def test_how_the_counts_were_cut_into_batches_does_not_matter() -> None:
    batches = [random_batch(seed) for seed in range(5)]
    together = MicroBatch(*(np.concatenate([getattr(b, name) for b in batches]) for name in MicroBatch.__annotations__))
    one, many = Bigram.count([together], VOCAB), Bigram.count(batches, VOCAB)
    assert one.nats_per_token(batches) == pytest.approx(many.nats_per_token(batches), rel=1e-14)


def test_the_baseline_counts_what_the_run_reads(tmp_path: Path) -> None:
    write_source(tmp_path / "source", [random_documents(1, 60, 30, VOCAB)], vocab_size=VOCAB)
    name = str(tmp_path / "source")
    plan = DataPlan.from_recipe(recipe_with([(1, {name: 1.0})], vocab_size=VOCAB))
    few, many = (bigram_baseline(plan, range(1, last + 1), 50)[name] for last in (1, 9))
    assert 0 < many < few < 2.5, "more of the very text that is asked for makes it more likely"


def test_stages_of_different_sequence_lengths_are_counted_together(tmp_path: Path) -> None:
    write_source(tmp_path / "source", [random_documents(1, 200, 30, VOCAB)], vocab_size=VOCAB)
    name = str(tmp_path / "source")
    stages = [(1, {name: 1.0}), (3, {name: 1.0}), (5, {name: 1.0})]
    plan = DataPlan.from_recipe(recipe_with(stages, vocab_size=VOCAB, lengths=[None, 32, None], train_steps=6))
    lengths = [plan.sequence_length_at(step) for step in range(1, 7)]
    assert lengths == [8, 8, 32, 32, 8, 8]
    batches = [
        batch
        for step in range(1, 7)
        for batch in plan.step(step, dp=1, dp_rank=0, num_micro_batches=1, micro_batch_size=12).micro_batches
    ]
    expected = Bigram.count(batches, VOCAB).nats_per_token(plan.validation(name, 50, micro_batch_size=8).micro_batches)
    assert bigram_baseline(plan, range(1, 7), 50)[name] == pytest.approx(expected, rel=1e-12)


def test_a_long_run_is_counted_on_steps_that_are_evenly_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_with([(1, {"a": 1.0}), (31, {"a": 1.0})], lengths=[None, 16], train_steps=60)
    assert steps_to_count(recipe) == range(1, 61), "60 steps of 12 sequences have few tokens"
    monkeypatch.setattr("data.bigram.MOST_TOKENS", 1000)
    steps = steps_to_count(recipe)
    tokens = sum(12 * (8 if step <= 30 else 16) for step in steps)
    assert steps.step == 9 and steps[-1] > 50 and 800 < tokens <= 1000 + 12 * 16
