"""Whether a checkpoint is one of the model at hand: the same tensors of the same shapes, no more and no fewer.

torch reads what a rank asks for and no more: a checkpoint of a deeper model would be read without a word.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch.distributed as torch_dist

from nanotron_recipes.errors import UserError
from parallel.buckets import Bucket

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of a global tensor, by name."""


def whole_model(buckets: list[Bucket]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model, of all pipeline stages; a collective of the world."""
    mine = {slot.name: tuple(slot.shard.global_shape) for bucket in buckets for slot in bucket.slots}
    if not torch_dist.is_initialized():
        return mine
    everyone: list[dict[str, tuple[int, ...]]] = [{}] * torch_dist.get_world_size()
    torch_dist.all_gather_object(everyone, mine)
    return {name: shape for held in everyone for name, shape in held.items()}


def require_same_model(folder: Path, there: Shapes, expected: Shapes, prefixes: Iterable[str]) -> None:
    """Compare a checkpoint's tensors with the model's.

    Args:
        there: by their names in the checkpoint.
        expected: by the parameters' global names.
        prefixes: of the names in the checkpoint; below each of them all parameters must be there.

    Raises:
        UserError: names the first tensor that is missing, too many, or of another shape.
    """
    for prefix in prefixes:
        wanted = {prefix + name: shape for name, shape in expected.items()}
        found = {name: shape for name, shape in there.items() if name.startswith(prefix)}
        _refuse(folder, wanted.keys() - found.keys(), "it has no {}")
        _refuse(folder, found.keys() - wanted.keys(), "it has {}, and the recipe's model has not")
        for name in sorted(found):
            if found[name] != wanted[name]:
                raise _another_model(folder, f"{name} is {found[name]}, and {wanted[name]} in the recipe's model")


def _refuse(folder: Path, names: set[str], what: str) -> None:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise _another_model(folder, what.format(f"{min(names)}{more}"))


def _another_model(folder: Path, what: str) -> UserError:
    return UserError(f"{folder}: a checkpoint of another model: {what}")
