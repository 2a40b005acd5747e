"""What a rank may compute with on this machine, without importing torch."""

import os
from pathlib import Path

from nanotron_recipes.machine import usable_cpus
from nanotron_recipes.recipe import Recipe


def gpus_here() -> int:
    """GPUs that this process may use: 0 where the driver is not loaded."""
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else min(present, len([gpu for gpu in visible.split(",") if gpu.strip()]))


def threads_per_rank(recipe: Recipe, num_ranks: int) -> int | None:
    """Threads of each of `num_ranks` CPU ranks on this machine: one where the recipe asks for several ranks a node,
    else its share; None, what the libraries choose, beside a GPU."""
    if gpus_here():
        return None
    return 1 if recipe.general.cpu_ranks_per_node > 1 else max(1, usable_cpus() // num_ranks)
