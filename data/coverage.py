"""What a run reads of every source, from manifests alone: tokens and epochs, stage by stage."""

from collections.abc import Mapping
from dataclasses import dataclass

from data.readings import blocks_per_epoch, mixture_of
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import block_length, stage_sequence_length
from nanotron_recipes.skipped import SkippedBatches
from nanotron_recipes.topology import global_batch_size


@dataclass(frozen=True)
class Coverage:
    """What a run reads of one source in one stage."""

    number: int
    """Of the stage, from 0: names may be the same."""
    stage: str
    source: str
    samples: int
    tokens: int
    """samples × sequence length of the stage."""
    epochs: float | None
    """How often the whole source has been gone through by the end of the stage or, if that is earlier, of the run, with
    earlier stages and what was skipped; None where its size is not known."""


def coverage(recipe: Recipe, source_tokens: Mapping[str, int]) -> list[Coverage]:
    """Every stage with every source of it, up to the run's last step.

    `source_tokens` are the training tokens of the sources whose manifests are known. UserError where a mixture makes no
    sense.
    """
    block, batch_size = block_length(recipe), global_batch_size(recipe)
    skipped = SkippedBatches.of(recipe)
    end_of_run = skipped.batch_of(recipe.tokens.train_steps) + 1
    lines: list[Coverage] = []
    gone: dict[str, int] = {}
    for number, stage in enumerate(recipe.data_stages):
        first, following = stage.start_training_step, recipe.data_stages[number + 1 :][:1]
        end = max(first, min([end_of_run, *(entry.start_training_step for entry in following)]))
        mixture, width = mixture_of(stage), stage_sequence_length(recipe, stage) // block
        read = [0] * len(stage.data.dataset.dataset_folder)
        for begin, stop in skipped.read_between(first, end):
            before, until = (mixture.counts((batch - first) * batch_size) for batch in (begin, stop))
            read = [sum_ + more - less for sum_, more, less in zip(read, until, before, strict=True)]
        passed = mixture.counts((end - first) * batch_size)
        for name, samples, all_samples in zip(stage.data.dataset.dataset_folder, read, passed, strict=True):
            gone[name] = gone.get(name, 0) + all_samples * width
            blocks = blocks_per_epoch(source_tokens[name], block) if name in source_tokens else 0
            epochs = gone[name] / blocks if blocks else None
            lines.append(Coverage(number, stage.name, name, samples, samples * width * block, epochs))
    return lines
