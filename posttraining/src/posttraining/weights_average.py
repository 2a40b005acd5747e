"""The weighted sum of models' weights, tensor by tensor over their safetensors files."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from posttraining.errors import NO_VALUE, mistake
from posttraining.files import reading
from posttraining.model_folder import INDEX


def write_average(folders: Sequence[Path], weights: Sequence[float], target: Path) -> int:
    """Write the weighted sum of these models into `target`, in the files and dtypes of the first; returns the tensors.

    The sum is taken in fp32 and one tensor at a time, so that memory holds one file of the result and never a model
    of each parent. Tensors that are no floating-point numbers must be equal everywhere.

    Raises Mistake where a tensor is missing, of another shape, or an unequal integer.
    """
    places = [_places(folder) for folder in folders]
    for other, found in zip(folders[1:], places[1:], strict=True):
        _check_names(folders[0], places[0], other, found)
    files: dict[str, list[str]] = {}
    for name, file in places[0].items():
        files.setdefault(file, []).append(name)
    for file, names in files.items():
        summed = {name: _sum(name, folders, places, weights) for name in names}
        save_file(summed, target / file, metadata={"format": "pt"})
    if (folders[0] / INDEX).exists():
        with reading(folders[0] / INDEX):
            index = (folders[0] / INDEX).read_bytes()
        (target / INDEX).write_bytes(index)
    return len(places[0])


def _places(folder: Path) -> dict[str, str]:
    """Tensor name → file."""
    places: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with reading(file), safe_open(file, framework="pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), file.name)
    if not places:
        raise mistake(folder, None, NO_VALUE, "no *.safetensors; expected the weights of a Hugging Face model")
    if (folder / INDEX).exists():
        with reading(folder / INDEX):
            listed = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
        if listed != set(places):
            raise mistake(folder / INDEX, None, NO_VALUE, "lists other tensors than the files hold")
    return places


def _check_names(first: Path, expected: dict[str, str], other: Path, found: dict[str, str]) -> None:
    different = sorted(set(expected) ^ set(found))
    if different:
        holder, lacking = (first, other) if different[0] in expected else (other, first)
        objection = f"has no such tensor, and {holder} has; expected models of one shape"
        raise mistake(lacking, different[0], NO_VALUE, objection)


def _sum(
    name: str, folders: Sequence[Path], places: Sequence[dict[str, str]], weights: Sequence[float]
) -> torch.Tensor:
    tensors = []
    for folder, place in zip(folders, places, strict=True):
        with reading(folder), safe_open(folder / place[name], framework="pt") as file:
            tensors.append(file.get_tensor(name))
    first = tensors[0]
    for folder, tensor in zip(folders, tensors, strict=True):
        if tensor.shape != first.shape:
            expected = f"expected the shape {tuple(first.shape)} as in {folders[0]}"
            raise mistake(folder, name, tuple(tensor.shape), expected)
    if not first.is_floating_point():
        if not all(torch.equal(first, tensor) for tensor in tensors):
            raise mistake(folders[0], name, NO_VALUE, "integers that differ between the models cannot be averaged")
        return first
    total = torch.zeros_like(first, dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.to(torch.float32)
    return total.to(first.dtype)
