"""The plan of a run's data: what every step trains on, as a pure function of the recipe and the step.

Nothing is built or remembered: a step's global batch is computed from its number, so that a run can start at any step,
on any number of ranks, in milliseconds.
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from data.batch import Int64Array, MicroBatch, StepBatch, fill_rows, micro_batch_from_windows
from data.mixture import Mixture
from data.order import Permutation, derive_key
from data.sources import Source, open_sources
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.skipped import SkippedBatches
from nanotron_recipes.topology import global_batch_size

ORDER_VERSION = 1
"""Part of every fingerprint: raise it when the same shards shall be read in another order than before."""


@dataclass(frozen=True)
class _Stage:
    name: str
    seed: int
    first_batch: int
    sources: list[Source]
    mixture: Mixture
    read_before: list[int]
    """Samples that each source gave before this stage, to skipped batches too."""


@dataclass(frozen=True)
class Coverage:
    """What a run reads of one source in one stage."""

    stage: str
    source: str
    samples: int
    tokens: int
    """samples × sequence length."""
    epochs: float
    """How often the whole source has been gone through by the end of the stage, with earlier stages and what was
    skipped."""


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
        self._skipped = SkippedBatches.of(recipe)
        self._restart_positions = recipe.model.architecture.use_doc_masking
        self._stages = self._plan_stages(recipe)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> "DataPlan":
        """Opens the recipe's sources and plans its stages; UserError where anything is missing or does not fit."""
        if not recipe.data_stages:
            raise UserError("data_stages: missing; expected at least one stage to train on")
        return cls(recipe, open_sources(recipe))

    def _plan_stages(self, recipe: Recipe) -> list[_Stage]:
        stages: list[_Stage] = []
        read: dict[str, int] = dict.fromkeys(self.sources, 0)
        for number, stage in enumerate(recipe.data_stages):
            names = stage.data.dataset.dataset_folder
            weights = stage.data.dataset.dataset_weights or [1.0] * len(names)
            if len(set(names)) < len(names) or len(weights) != len(names) or sum(weights) <= 0:
                raise UserError(
                    f"data_stages {stage.name}: expected different entries in dataset_folder, and a weight for each "
                    "that is not negative, not all of them 0"
                )
            mixture = Mixture.from_weights(weights)
            stages.append(
                _Stage(
                    name=stage.name,
                    seed=stage.data.seed,
                    first_batch=stage.start_training_step,
                    sources=[self.sources[name] for name in names],
                    mixture=mixture,
                    read_before=[read[name] for name in names],
                )
            )
            if number + 1 < len(recipe.data_stages):
                steps = recipe.data_stages[number + 1].start_training_step - stage.start_training_step
                for name, count in zip(names, mixture.counts(steps * self.global_batch_size), strict=True):
                    read[name] += count
        return stages

    @property
    def source_fingerprints(self) -> dict[str, str]:
        """By source, what its shards hold."""
        return {name: source.manifest.fingerprint for name, source in self.sources.items()}

    @property
    def fingerprint(self) -> str:
        """sha256 over the content of all sources and the way of ordering them, hexadecimal."""
        content = [ORDER_VERSION, self.source_fingerprints]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def stage_of(self, step: int) -> int:
        """The number of the stage that step `step` (from 1) belongs to: that of the batch it reads."""
        batch = self._skipped.batch_of(step)
        return max(i for i, stage in enumerate(self._stages) if i == 0 or stage.first_batch <= batch)

    def samples(self, step: int) -> tuple[list[Source], Int64Array, Int64Array]:
        """The global batch of step `step` (from 1) in its final order.

        The sources of its stage; for each sample the number of its source in that list, and the first token of its
        window there (int64 [global_batch_size] both).
        """
        stage, batch = self._stages[self.stage_of(step)], self._skipped.batch_of(step)
        first = (batch - stage.first_batch) * self.global_batch_size
        # The mixture is even over any stretch of samples, so ranks would see their own repeating pattern of sources
        # without one more permutation inside the batch.
        inside = Permutation(self.global_batch_size, derive_key(stage.seed, "batch", batch))
        places = inside.of(np.arange(self.global_batch_size, dtype=np.int64))
        numbers, before = stage.mixture.at(first + places)
        starts = np.empty_like(before)
        for number, source in enumerate(stage.sources):
            mine = numbers == number
            if mine.any():
                starts[mine] = source.window_starts(before[mine] + stage.read_before[number])
        return stage.sources, numbers, starts

    def source_names(self, step: int) -> list[str]:
        """The sources that the global batch of step `step` (from 1) has samples of."""
        sources, numbers, _ = self.samples(step)
        return [sources[number].name for number in np.unique(numbers).tolist()]

    def step(self, step: int, *, dp: int, dp_rank: int, num_micro_batches: int, micro_batch_size: int) -> StepBatch:
        """What data-parallel rank `dp_rank` of `dp` trains on in step `step` (from 1).

        Rank r has samples r·B/dp … (r+1)·B/dp − 1 of the global batch of B sequences, which is the same for every dp.
        """
        assert dp * num_micro_batches * micro_batch_size == self.global_batch_size, "the batch is dp · micro-batches"
        sources, numbers, starts = self.samples(step)
        valid = sum(
            source.train.valid_targets(starts[numbers == number], self.sequence_length + 1)
            for number, source in enumerate(sources)
        )
        size = self.global_batch_size // dp
        mine = slice(dp_rank * size, (dp_rank + 1) * size)
        tokens = np.empty((size, self.sequence_length + 1), dtype=np.int64)
        document_starts = np.empty(tokens.shape, dtype=np.bool_)
        for number, source in enumerate(sources):
            rows = numbers[mine] == number
            if rows.any():
                windows = source.train.windows(starts[mine][rows], self.sequence_length + 1)
                tokens[rows], document_starts[rows] = windows
        micro_batches = [
            micro_batch_from_windows(
                tokens[first : first + micro_batch_size],
                document_starts[first : first + micro_batch_size],
                restart_positions=self._restart_positions,
            )
            for first in range(0, size, micro_batch_size)
        ]
        names = [sources[number].name for number in numbers[mine].tolist()]
        return StepBatch(micro_batches, valid, self._stages[self.stage_of(step)].name, names)

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
        lines = []
        end_of_run = self._skipped.batch_of(self.train_steps) + 1
        for number, stage in enumerate(self._stages):
            following = self._stages[number + 1].first_batch if number + 1 < len(self._stages) else end_of_run
            end = max(min(following, end_of_run), stage.first_batch)
            passed, read = self._counts(stage, end), [0] * len(stage.sources)
            for first, last in self._skipped.read_between(stage.first_batch, end):
                counts = zip(read, self._counts(stage, first), self._counts(stage, last), strict=True)
                read = [sum_ + until - before for sum_, before, until in counts]
            for source, gone, samples, before in zip(stage.sources, passed, read, stage.read_before, strict=True):
                epochs = (before + gone) / source.windows_per_epoch if end > stage.first_batch else 0.0
                tokens = samples * self.sequence_length
                lines.append(Coverage(stage.name, source.name, samples, tokens, epochs))
        return lines

    def _counts(self, stage: _Stage, end: int) -> list[int]:
        """Samples of each source in the batches of a stage before batch `end`."""
        return stage.mixture.counts((end - stage.first_batch) * self.global_batch_size)
