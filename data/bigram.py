"""A bigram model with Witten-Bell smoothing: what a language model must beat before it is of any interest.

P(w | h) = (c(h w) + t(h) · P(w)) / (c(h) + t(h)), where t(h) is the number of different tokens seen after h; in the
same way P(w) = (c(w) + t / V) / (n + t) with t different tokens in n, over a vocabulary of V (Witten and Bell 1991).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from data.batch import MicroBatch
from data.plan import DataPlan
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import tokens_through

MOST_TOKENS = 1 << 26
"""A bigram model is counted on so many tokens at most: some twenty seconds."""
_PIECE_TOKENS = 1 << 20

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bigram:
    """Counts of pairs of tokens inside documents."""

    vocab_size: int
    pairs: Int64Array
    """Codes previous · vocab_size + next of the pairs that were seen, rising."""
    pair_counts: Int64Array
    """How often each was seen."""
    contexts: Int64Array
    """By token, how often it was followed by one."""
    followers: Int64Array
    """By token, by how many different ones."""
    unigram: FloatArray
    """By token, its smoothed probability."""

    @classmethod
    def count(cls, batches: Iterable[MicroBatch], vocab_size: int) -> "Bigram":
        """Counts every input and target of the batches whose mask is true; at most vocab_size² pairs are kept."""
        pairs, counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        for batch in batches:
            new, new_counts = np.unique(_codes(batch, vocab_size), return_counts=True)
            merged, places = np.unique(np.concatenate([pairs, new]), return_inverse=True)
            weights = np.concatenate([counts, new_counts])
            pairs, counts = merged, np.bincount(places, weights, len(merged)).astype(np.int64)
        previous, following = np.divmod(pairs, vocab_size)
        seen = np.bincount(following, counts, vocab_size)
        kinds, total = np.count_nonzero(seen), seen.sum()
        assert total > 0, "a bigram model is counted on at least one pair"
        return cls(
            vocab_size=vocab_size,
            pairs=pairs,
            pair_counts=counts,
            contexts=np.bincount(previous, counts, vocab_size).astype(np.int64),
            followers=np.bincount(previous, minlength=vocab_size),
            unigram=(seen + kinds / vocab_size) / (total + kinds),
        )

    def nats_per_token(self, batches: Iterable[MicroBatch]) -> float:
        """Mean of −ln P(target | input) over the targets whose mask is true; NaN where there are none."""
        total, number = 0.0, 0
        for batch in batches:
            codes = _codes(batch, self.vocab_size)
            previous, following = np.divmod(codes, self.vocab_size)
            places = np.minimum(np.searchsorted(self.pairs, codes), len(self.pairs) - 1)
            counts = np.where(self.pairs[places] == codes, self.pair_counts[places], 0)
            kinds, seen = self.followers[previous], self.contexts[previous]
            backed_off = self.unigram[following]
            known = seen > 0
            smoothed = (counts + kinds * backed_off) / np.maximum(seen + kinds, 1)
            total -= float(np.log(np.where(known, smoothed, backed_off)).sum())
            number += len(codes)
        return total / number if number else float("nan")


def steps_to_count(recipe: Recipe) -> range:
    """The steps of a run whose tokens a bigram model is counted on: all of them; of a run with more than MOST_TOKENS
    tokens, evenly spread ones that have about as many."""
    last = recipe.tokens.train_steps
    return range(1, last + 1, max(1, ceil(tokens_through(recipe, last) / MOST_TOKENS)))


def bigram_baseline(plan: DataPlan, steps: Iterable[int], num_sequences: int) -> dict[str, float]:
    """Nats a token, by source, of a bigram model counted on exactly what `steps` (from 1) train on, all sources
    together, on the same held-out windows as the model's validation loss: at most `num_sequences` of each source."""
    vocab_size = next(iter(plan.sources.values())).manifest.vocab_size
    size = plan.global_batch_size
    read = (plan.step(step, dp=1, dp_rank=0, num_micro_batches=1, micro_batch_size=size) for step in steps)
    bigram = Bigram.count(_in_large_pieces(batch for step in read for batch in step.micro_batches), vocab_size)
    return {
        name: bigram.nats_per_token(plan.validation(name, num_sequences, micro_batch_size=64).micro_batches)
        for name in plan.sources
    }


def _codes(batch: MicroBatch, vocab_size: int) -> Int64Array:
    return batch.input_ids[batch.target_mask] * vocab_size + batch.target_ids[batch.target_mask]


def _in_large_pieces(batches: Iterable[MicroBatch]) -> Iterable[MicroBatch]:
    """The same rows in fewer batches, each of rows of one length: merging counts costs as much as there are different
    pairs."""
    waiting: list[MicroBatch] = []
    tokens = 0
    for batch in batches:
        if waiting and (tokens >= _PIECE_TOKENS or batch.tokens.shape[1] != waiting[0].tokens.shape[1]):
            yield _joined(waiting)
            waiting, tokens = [], 0
        waiting.append(batch)
        tokens += batch.tokens.size
    if waiting:
        yield _joined(waiting)


def _joined(batches: list[MicroBatch]) -> MicroBatch:
    return MicroBatch(
        tokens=np.concatenate([batch.tokens for batch in batches]),
        target_mask=np.concatenate([batch.target_mask for batch in batches]),
        position_ids=np.concatenate([batch.position_ids for batch in batches]),
    )
