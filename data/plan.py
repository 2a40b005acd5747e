"""The plan of a run's data: what every step trains on, as a pure function of the recipe and the step.

Nothing is built or remembered: a step's global batch is computed from its number, so that a run can start at any step,
on any number of ranks, in milliseconds.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock

import numpy as np

from data.batch import MicroBatch, StepBatch, StepBuffers, fill_rows, micro_batch_from_windows
from data.coverage import Coverage, coverage
from data.filling import fill
from data.order import Permutation, derive_key
from data.samples import PlannedBatch, plan_batches
from data.sources import Source, open_sources
from data.stages import plan_stages
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.skipped import SkippedBatches
from nanotron_recipes.topology import global_batch_size

ORDER_VERSION = 1
"""Part of every fingerprint: raise it when the same shards shall be read in another order than before."""
SAMPLES_AT_ONCE = 2048
"""Batches are planned so many samples at a time: more is no faster, and a start waits for the first ones."""
CHUNKS_KEPT = 3
"""Of batches planned together: threads that read ahead are not all in the same one."""


def data_fingerprint(sources: Mapping[str, str]) -> str:
    """sha256, hexadecimal, over the way of ordering sources and what their shards hold, a fingerprint by name."""
    return hashlib.sha256(json.dumps([ORDER_VERSION, dict(sources)], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ValidationBatches:
    """The held-out windows of one source that one data-parallel rank evaluates."""

    micro_batches: list[MicroBatch]
    """As many on every rank, all of the same shape; rows that fill up have a mask that is False everywhere."""
    num_valid_targets: int
    """Targets with a true mask on all ranks together: what the sum of all ranks' losses is divided by."""


class DataPlan:
    """What every step of a run trains on, and the held-out windows."""

    def __init__(self, recipe: Recipe, sources: dict[str, Source]) -> None:
        """Use from_recipe."""
        self.sequence_length = recipe.tokens.sequence_length
        self.global_batch_size = global_batch_size(recipe)
        self.train_steps = recipe.tokens.train_steps
        self.sources = sources
        self._recipe = recipe
        self._skipped = SkippedBatches.of(recipe)
        self._restart_positions = recipe.model.architecture.use_doc_masking
        self._stages, self._orders = plan_stages(recipe, sources)
        self._first_batches = [stage.first_batch for stage in self._stages]
        self._last_batch = self._skipped.batch_of(self.train_steps)
        self._planned: dict[tuple[int, int], list[PlannedBatch]] = {}
        self._planning = Lock()

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> "DataPlan":
        """Opens the recipe's sources and plans its stages; UserError where anything is missing or does not fit."""
        if not recipe.data_stages:
            raise UserError("data_stages: missing; expected at least one stage to train on")
        return cls(recipe, open_sources(recipe))

    @property
    def source_fingerprints(self) -> dict[str, str]:
        """By source, what its shards hold."""
        return {name: source.manifest.fingerprint for name, source in self.sources.items()}

    @property
    def fingerprint(self) -> str:
        """sha256 over the content of all sources and the way of ordering them, hexadecimal."""
        return data_fingerprint(self.source_fingerprints)

    def stage_of(self, step: int) -> int:
        """The number of the stage that step `step` (from 1) belongs to: that of the batch it reads."""
        return self._stage_of_batch(self._skipped.batch_of(step))

    def _stage_of_batch(self, batch: int) -> int:
        return max(bisect_right(self._first_batches, batch) - 1, 0)

    def sequence_length_at(self, step: int) -> int:
        """Tokens of a sequence in step `step` (from 1)."""
        return self._stages[self.stage_of(step)].sequence_length

    def planned(self, step: int) -> PlannedBatch:
        """The global batch of step `step` (1 … train_steps) in its final order, whatever the number of ranks."""
        batch = self._skipped.batch_of(step)
        number = self._stage_of_batch(batch)
        stage = self._stages[number]
        batches = max(1, SAMPLES_AT_ONCE // self.global_batch_size)
        chunk, place = divmod(batch - stage.first_batch, batches)
        with self._planning:
            if (number, chunk) not in self._planned:
                if len(self._planned) == CHUNKS_KEPT:
                    del self._planned[next(iter(self._planned))]
                first = stage.first_batch + chunk * batches
                # Nothing beyond the run's end: what only such batches read may not be here.
                last = min(first + batches - 1, self._last_batch, stage.last_batch or self._last_batch)
                count = last + 1 - first
                self._planned[number, chunk] = plan_batches(stage, self._orders, first, count, self.global_batch_size)
            return self._planned[number, chunk][place]

    def announce(self, step: int, *, dp: int, dp_rank: int) -> None:
        """Asks the system to read what a rank will train on in step `step`, where it is not in memory already."""
        planned = self.planned(step)
        size = self.global_batch_size // dp
        for piece in planned.pieces(slice(dp_rank * size, (dp_rank + 1) * size)):
            planned.stage.sources[piece.source].train.announce(piece.start, piece.length + 1)

    def source_names(self, step: int) -> list[str]:
        """The sources that the global batch of step `step` (from 1) has samples of."""
        planned = self.planned(step)
        return [planned.stage.sources[number].name for number in np.unique(planned.numbers).tolist()]

    def step(
        self,
        step: int,
        *,
        dp: int,
        dp_rank: int,
        num_micro_batches: int,
        micro_batch_size: int,
        buffers: StepBuffers | None = None,
    ) -> StepBatch:
        """What data-parallel rank `dp_rank` of `dp` trains on in step `step` (from 1).

        Rank r has samples r·B/dp … (r+1)·B/dp − 1 of the global batch of B sequences, which is the same for every dp.
        The arrays lie in `buffers` where they are given and have the stage's shape.
        """
        assert dp * num_micro_batches * micro_batch_size == self.global_batch_size, "the batch is dp · micro-batches"
        planned = self.planned(step)
        size = self.global_batch_size // dp
        samples = slice(dp_rank * size, (dp_rank + 1) * size)
        length = planned.stage.sequence_length
        if buffers is None or buffers.shape != (size, length):
            buffers = StepBuffers.allocated(size, length)
        fill(buffers, planned, samples, restart_positions=self._restart_positions)
        micro_batches = [
            buffers.micro_batch(slice(first, first + micro_batch_size)) for first in range(0, size, micro_batch_size)
        ]
        names = [planned.stage.sources[number].name for number in planned.numbers[samples].tolist()]
        return StepBatch(micro_batches, planned.num_valid_targets, planned.stage.name, names)

    def validation(
        self,
        source: str,
        num_sequences: int,
        *,
        dp: int = 1,
        dp_rank: int = 0,
        micro_batch_size: int,
        min_micro_batches: int = 1,
    ) -> ValidationBatches:
        """Held-out windows of `source`, the same at any dp: at most `num_sequences`, fewer where there are fewer.

        They are dealt to the ranks in turn; every rank gets as many micro-batches of the same shape, at least
        `min_micro_batches` (a pipeline may need several). Without held-out windows there are no micro-batches.
        """
        chosen = self.sources[source]
        available = max(0, (chosen.validation.num_tokens - 1) // self.sequence_length)
        count = min(num_sequences, available)
        if count == 0:
            return ValidationBatches([], 0)
        order = Permutation(available, derive_key("validation", chosen.manifest.fingerprint))
        starts = order.of(np.arange(count, dtype=np.int64)) * self.sequence_length
        valid = chosen.validation.valid_targets(starts, self.sequence_length + 1)
        tokens, document_starts = chosen.validation.windows(starts[dp_rank::dp], self.sequence_length + 1)
        rows = max(-(-count // dp), 1)
        batches = max(-(-rows // micro_batch_size), min_micro_batches)
        micro_batches = []
        for first in range(0, batches * micro_batch_size, micro_batch_size):
            part = slice(first, first + micro_batch_size)
            batch = micro_batch_from_windows(
                tokens[part], document_starts[part], restart_positions=self._restart_positions
            )
            micro_batches.append(fill_rows(batch, micro_batch_size))
        return ValidationBatches(micro_batches, valid)

    def coverage(self) -> list[Coverage]:
        """What the run reads of every source in every stage, up to its last step."""
        return coverage(self._recipe, {name: source.manifest.train.tokens for name, source in self.sources.items()})
