"""What a rank may compute with on this machine, without importing torch."""

import os
from itertools import takewhile
from pathlib import Path

from nanotron_recipes.machine import GPUS_VARIABLE, usable_cpus
from nanotron_recipes.recipe import Recipe


def gpus_here() -> int:
    """GPUs that this process may use: those that NVIDIA's driver lists, up to what CUDA_VISIBLE_DEVICES leaves; 0 where
    it is not loaded, lists none (WSL2), or its devices are not reachable."""
    return visible_gpus(present_gpus(Path("/")), os.environ.get(GPUS_VARIABLE))


def present_gpus(root: Path) -> int:
    """GPUs that NVIDIA's driver lists below `root`. A container that was given none sees the list too, but no devices;
    outside of one they may be made at their first use, by nvidia-modprobe."""
    is_reachable = any(root.glob("dev/nvidia[0-9]*")) or (root / "usr/bin/nvidia-modprobe").exists()
    return len(list(root.glob("proc/driver/nvidia/gpus/*"))) if is_reachable else 0


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
