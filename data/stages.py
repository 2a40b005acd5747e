"""The stages of a run: which mixture is read from which step on, and how far each source has been read before."""

from dataclasses import dataclass

from data.blocks import BlockOrder, Reading
from data.mixture import Mixture
from data.sources import Source
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.data import DataStage
from nanotron_recipes.sequences import block_length, contiguous_length, stage_sequence_length
from nanotron_recipes.topology import global_batch_size


@dataclass(frozen=True)
class Stage:
    """A mixture and the batches that are made of it; where none is skipped, step n reads batch n."""

    name: str
    seed: int
    first_batch: int
    last_batch: int | None
    """The batch before the next stage; None for the last one, which has no end."""
    sequence_length: int
    sources: list[Source]
    mixture: Mixture
    read_before: list[int]
    """Blocks that each source gave before this stage, to skipped batches too."""


def plan_stages(recipe: Recipe, sources: dict[str, Source]) -> tuple[list[Stage], dict[str, BlockOrder]]:
    """The stages in order, and by source the order of its blocks. UserError where a mixture makes no sense."""
    block = block_length(recipe)
    stages: list[Stage] = []
    read = dict.fromkeys(sources, 0)
    readings: dict[str, list[Reading]] = {name: [] for name in sources}
    for number, entry in enumerate(recipe.data_stages):
        following = recipe.data_stages[number + 1] if number + 1 < len(recipe.data_stages) else None
        names, mixture = entry.data.dataset.dataset_folder, mixture_of(entry)
        stage = Stage(
            name=entry.name,
            seed=entry.data.seed,
            first_batch=entry.start_training_step,
            last_batch=following.start_training_step - 1 if following else None,
            sequence_length=stage_sequence_length(recipe, entry),
            sources=[sources[name] for name in names],
            mixture=mixture,
            read_before=[read[name] for name in names],
        )
        stages.append(stage)
        blocks = stage.sequence_length // block
        for name in names:
            readings[name].append(Reading(read[name], blocks))
        if stage.last_batch is not None:
            batches = stage.last_batch - stage.first_batch + 1
            for name, count in zip(names, mixture.counts(batches * global_batch_size(recipe)), strict=True):
                read[name] += count * blocks
    stretch = contiguous_length(recipe) // block
    orders = {
        name: BlockOrder(
            source.blocks_per_epoch, source.seed, source.manifest.fingerprint, stretch, tuple(readings[name])
        )
        for name, source in sources.items()
    }
    return stages, orders


def mixture_of(stage: DataStage) -> Mixture:
    """The mixture of a stage's weights. UserError where it makes no sense."""
    names = stage.data.dataset.dataset_folder
    weights = stage.data.dataset.dataset_weights or [1.0] * len(names)
    if len(set(names)) < len(names) or len(weights) != len(names) or sum(weights) <= 0:
        raise UserError(
            f"data_stages {stage.name}: expected different entries in dataset_folder, and a weight for each "
            "that is not negative, not all of them 0"
        )
    return Mixture.from_weights(weights)
