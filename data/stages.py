"""The stages of a run: which mixture is read from which step on, and how far each source has been read before."""

from dataclasses import dataclass

from data.blocks import BlockOrder
from data.mixture import Mixture
from data.readings import block_orders, blocks_before, mixture_of
from data.sources import Source
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import stage_sequence_length


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
    mixtures = [mixture_of(entry) for entry in recipe.data_stages]
    before = blocks_before(recipe, mixtures)
    stages: list[Stage] = []
    for number, entry in enumerate(recipe.data_stages):
        following = recipe.data_stages[number + 1] if number + 1 < len(recipe.data_stages) else None
        names = entry.data.dataset.dataset_folder
        stage = Stage(
            name=entry.name,
            seed=entry.data.seed,
            first_batch=entry.start_training_step,
            last_batch=following.start_training_step - 1 if following else None,
            sequence_length=stage_sequence_length(recipe, entry),
            sources=[sources[name] for name in names],
            mixture=mixtures[number],
            read_before=[before[number].get(name, 0) for name in names],
        )
        stages.append(stage)
    return stages, block_orders(recipe, {name: source.manifest for name, source in sources.items()}, before)
