"""What a run reads of every source, from manifests alone: tokens and epochs, stage by stage."""

from collections.abc import Mapping
from dataclasses import dataclass

from data.stages import mixture_of
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import block_length, stage_sequence_length
from nanotron_recipes.topology import global_batch_size


@dataclass(frozen=True)
class Coverage:
    """What a run reads of one source in one stage."""

    stage: str
    source: str
    samples: int
    tokens: int
    """samples × sequence length of the stage."""
    epochs: float | None
    """How often the whole source has been read by the end of the stage, earlier stages included; None where its size
    is not known."""


def coverage(recipe: Recipe, source_tokens: Mapping[str, int]) -> list[Coverage]:
    """Every stage with every source of it, up to the run's last step.

    `source_tokens` are the training tokens of the sources whose manifests are known. UserError where a mixture makes no
    sense.
    """
    block, last_step = block_length(recipe), recipe.tokens.train_steps
    lines: list[Coverage] = []
    read: dict[str, int] = {}
    for number, stage in enumerate(recipe.data_stages):
        following = recipe.data_stages[number + 1 :][:1]
        end = min([last_step + 1, *(entry.start_training_step for entry in following)])
        steps = max(0, end - stage.start_training_step)
        length = stage_sequence_length(recipe, stage)
        counts = mixture_of(stage).counts(steps * global_batch_size(recipe))
        for name, samples in zip(stage.data.dataset.dataset_folder, counts, strict=True):
            read[name] = read.get(name, 0) + samples * (length // block)
            blocks = max(0, source_tokens[name] - 1) // block if name in source_tokens else 0
            epochs = (read[name] / blocks if steps else 0.0) if blocks else None
            lines.append(Coverage(stage.name, name, samples, samples * length, epochs))
    return lines
