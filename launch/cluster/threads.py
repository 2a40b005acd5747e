"""What a rank may compute with on this machine, without importing torch."""

import os
from itertools import takewhile
from pathlib import Path

from nanotron_recipes.machine import GPUS_VARIABLE, usable_cpus
from nanotron_recipes.recipe import Recipe


def gpus_here() -> int:
    """GPUs that this process may use, as NVIDIA's driver lists them: 0 where it is not loaded or lists none (WSL2)."""
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return visible_gpus(present, os.environ.get(GPUS_VARIABLE))


def visible_gpus(present: int, visible: str | None) -> int:
    """How many of the GPUs that are present CUDA_VISIBLE_DEVICES leaves (None: not set): those up to the first entry
    that names none, as CUDA reads it."""
    if visible is None:
        return present
    entries = (entry.strip() for entry in visible.split(","))
    return min(present, len(list(takewhile(lambda entry: entry and not entry.startswith("-"), entries))))


def threads_per_rank(recipe: Recipe, num_ranks: int, *, on_cpu: bool = False) -> int | None:
    """Threads of each of `num_ranks` CPU ranks on this machine: one where the recipe asks for several ranks a node,
    else its share; None, what torchrun chooses, beside a GPU, unless the ranks compute `on_cpu` all the same."""
    if gpus_here() and not on_cpu:
        return None
    return 1 if recipe.general.cpu_ranks_per_node > 1 else max(1, usable_cpus() // num_ranks)
