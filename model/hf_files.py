"""Safetensors shards written while the tensors arrive, and read one tensor at a time.

`safetensors.torch.save_file` wants a whole shard in memory. The container is simple enough to do without: eight bytes
with the header's length, a JSON header (dtype, shape and byte range of each tensor), then the bytes. As names and
shapes are known beforehand, every header is written first and each tensor goes to its place in any order, so memory
holds one tensor. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING

from nanotron_recipes.errors import UserError

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 5_000_000_000
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_FORMAT_NAMES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int
    size: int


class SafetensorsWriter:
    """Writes tensors of known names and shapes, all of one dtype, to safetensors files of at most `max_shard_bytes`.

    `shapes`: by name, in file order. `dtype`: "float32" or "bfloat16". `write` takes the tensors in any order; `close`
    raises ValueError when one never came, makes the files durable and writes the index when there are several.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: str,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self._folder, self._shapes, self._dtype = folder, shapes, dtype
        self._missing = set(shapes)
        self._places: dict[str, _Place] = {}
        self._open_files: dict[str, IO[bytes]] = {}
        shards = self._cut(max_shard_bytes)
        self.files = (
            [SINGLE_FILE]
            if len(shards) == 1
            else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        )
        for file, names in zip(self.files, shards, strict=True):
            self._start(file, names)
        self.total_bytes = sum(place.size for place in self._places.values())

    def _size(self, name: str) -> int:
        return prod(self._shapes[name]) * _FORMAT_NAMES[self._dtype][1]

    def _cut(self, max_shard_bytes: int) -> list[list[str]]:
        shards: list[list[str]] = [[]]
        used = 0
        for name in self._shapes:
            if shards[-1] and used + self._size(name) > max_shard_bytes:
                shards.append([])
                used = 0
            shards[-1].append(name)
            used += self._size(name)
        return shards

    def _start(self, file: str, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            begin, end = end, end + self._size(name)
            header[name] = {
                "dtype": _FORMAT_NAMES[self._dtype][0],
                "shape": list(self._shapes[name]),
                "data_offsets": [begin, end],
            }
            self._places[name] = _Place(file, begin, end - begin)
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        stream = (self._folder / file).open("wb")
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        data_start = 8 + len(encoded)
        for name in names:
            place = self._places[name]
            self._places[name] = _Place(file, data_start + place.offset, place.size)
        stream.truncate(data_start + end)
        self._open_files[file] = stream

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor at its place; it must be new, of the shape announced and of the writer's dtype."""
        import torch

        if name not in self._missing:
            raise ValueError(f"tensor {name} is unknown or came twice")
        if tuple(tensor.shape) != self._shapes[name] or str(tensor.dtype) != f"torch.{self._dtype}":
            expected = f"{self._dtype} {list(self._shapes[name])}"
            raise ValueError(f"tensor {name} is {tensor.dtype} {list(tensor.shape)}, expected {expected}")
        place = self._places[name]
        stream = self._open_files[place.file]
        stream.seek(place.offset)
        stream.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def close(self) -> None:
        """Make the shards durable and, when there are several, write their index."""
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors never came, among them {min(self._missing)}")
        for stream in self._open_files.values():
            stream.flush()
            os.fsync(stream.fileno())
        self.abandon()
        if len(self.files) > 1:
            index = {
                "metadata": {
                    "total_parameters": sum(prod(shape) for shape in self._shapes.values()),
                    "total_size": self.total_bytes,
                },
                "weight_map": {name: place.file for name, place in sorted(self._places.items())},
            }
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def abandon(self) -> None:
        """Close the files without finishing them."""
        for stream in self._open_files.values():
            stream.close()


class SafetensorsReader:
    """The tensors of a Hugging Face folder by name, each read from its memory-mapped shard when asked for."""

    def __init__(self, folder: Path, shards: dict[str, object], file_of: dict[str, str]) -> None:
        self._folder, self._shards, self._file_of = folder, shards, file_of

    @property
    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its header."""
        return tuple(self._slice(name).get_shape())  # type: ignore[attr-defined]

    def dtype(self, name: str) -> str:
        """The format's name of a tensor's dtype: "F32", "BF16", "F16", …"""
        return str(self._slice(name).get_dtype())  # type: ignore[attr-defined]

    def _slice(self, name: str) -> object:
        return self._shards[self._file_of[name]].get_slice(name)  # type: ignore[attr-defined]

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU."""
        return self._shards[self._file_of[name]].get_tensor(name)  # type: ignore[attr-defined]


@contextmanager
def open_safetensors(folder: Path) -> Iterator[SafetensorsReader]:
    """Open every shard of a Hugging Face folder; raises UserError for a missing, truncated or foreign file."""
    from safetensors import SafetensorError, safe_open

    shards: dict[str, object] = {}
    file_of: dict[str, str] = {}
    for file in _shard_files(folder):
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: missing, though {INDEX_FILE} names it")
        try:
            shards[file] = shard = safe_open(folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / file}: not a whole safetensors file ({error})") from error
        file_of |= dict.fromkeys(shard.keys(), file)
    yield SafetensorsReader(folder, shards, file_of)


def _shard_files(folder: Path) -> list[str]:
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    if not index.is_file():
        raise UserError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}; expected a Hugging Face model folder")
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not a safetensors index with a weight_map") from error
    if not files or not all(isinstance(file, str) and file and Path(file).name == file for file in files):
        raise UserError(f"{index}: weight_map: expected the name of a file in this folder for each tensor")
    return files
