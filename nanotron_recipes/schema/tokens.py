"""Section `tokens`: how much is read at a time and for how long."""

from __future__ import annotations

from typing import Annotated, Literal

from nanotron_recipes.schema.section import NoEffect, PositiveInt, Section, null_means


class Tokens(Section):
    """Sequences, batches, steps. Fix the batch with `global_batch_size`, or, as nanotron does, with the product of dp,
    micro_batch_size and batch_accumulation_per_replica."""

    sequence_length: PositiveInt
    """Tokens of a training sequence, where a stage does not say otherwise."""

    train_steps: PositiveInt
    """Steps (optimizer updates) of the whole run, counted from 1."""

    micro_batch_size: PositiveInt | Literal["auto"] = "auto"
    """Sequences that a replica sends through the model at once. It sets memory and speed, not what is learnt. auto: the
    largest divisor of the replica's batch that leaves at least pp micro-batches."""

    batch_accumulation_per_replica: PositiveInt | None = None
    """Micro-batches of a replica in each step. Null: derived from global_batch_size."""

    global_batch_size: PositiveInt | None = None
    """Sequences of a step over all replicas, whatever their number. Null: dp · micro_batch_size ·
    batch_accumulation_per_replica of this file."""

    block_length: PositiveInt | None = None
    """Tokens of a block, the unit in which each source is shuffled; the sequence length of every stage is a multiple of
    it. Null: sequence_length."""

    contiguous_length: PositiveInt | None = None
    """Tokens of text that stay together in the order of blocks, a multiple of block_length: sequences up to this length
    are one stretch of text, in whatever stage. Part of the order from the first step on, so set it beforehand where a
    stage with longer sequences may follow. Null: the longest sequence_length of the stages."""

    val_check_interval: Annotated[int, null_means(-1)] = -1
    """Steps between two validations; 0 or less means none."""

    limit_val_batches: Annotated[int, null_means(0)] = 0
    """Batches of global_batch_size sequences that a validation reads from each source's held-out part; 0 or less means
    no validation."""

    limit_test_batches: Annotated[int, null_means(0), NoEffect("there is no test set during training")] = 0
    """Batches of nanotron's test set."""

    @property
    def validates(self) -> bool:
        """Whether the run looks at its validation loss at all."""
        return self.val_check_interval > 0 and self.limit_val_batches > 0
