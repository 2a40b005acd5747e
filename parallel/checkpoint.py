"""Checkpoints of global tensors, written by all ranks in parallel and read at any topology.

A checkpoint is a folder of torch.distributed.checkpoint with the tensors ``model/<name>``,
``optimizer/exp_avg/<name>``, ``optimizer/exp_avg_sq/<name>`` and, where the model is not float32,
``optimizer/master/<name>``, plus ``state.json``.
It is written beside its final name and renamed when everything is on disk: what has the name is complete.
"""

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from nanotron_recipes.errors import UserError
from nanotron_recipes.files import sync, write_atomic
from parallel.boxes import Box, BoxedTensor, boxes_of_slot
from parallel.buckets import Bucket
from parallel.optimizer import FlatAdamW

MODEL = "model/"
OPTIMIZER = "optimizer/"
STATE_FILE = "state.json"
PARTIAL_SUFFIX = ".partial"


def save_checkpoint(
    folder: Path,
    buckets: list[Bucket],
    optimizer: FlatAdamW | None,
    state: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint; every rank of the world calls this with the same folder on storage that all see.

    Args:
        optimizer: None leaves the optimizer out (a model only).
        state: small JSON facts; `step` is the step whose result this is.
        files: text files to put beside the tensors, name -> content.
    """
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    is_first = not torch_dist.is_initialized() or torch_dist.get_rank() == 0
    if is_first:
        _remove_own(partial)
        partial.mkdir(parents=True)
    _barrier()
    tensors = boxed_tensors(buckets, optimizer)
    _save(tensors, partial)
    if is_first:
        counter = optimizer.num_updates() if optimizer is not None else 0
        _finish(partial, folder, {**state, "optimizer_updates": counter}, files or {})
    _barrier()


def load_checkpoint(folder: Path, buckets: list[Bucket], optimizer: FlatAdamW | None) -> dict[str, Any]:
    """Read what this rank needs of a checkpoint of any topology into its buffers; every rank calls this.

    Returns:
        The `state` it was saved with.

    Raises:
        UserError: the folder holds no complete checkpoint, or one of another model.
    """
    state = read_state(folder)
    try:
        _load(boxed_tensors(buckets, optimizer), folder)
    except CheckpointException as error:
        # Every rank fails with the reasons of all; one says it.
        reason = next(iter(error.failures.values()))[0]
        raise UserError(f"{folder}: the checkpoint cannot be read into the recipe's model: {reason}") from error
    if optimizer is not None:
        optimizer.set_num_updates(int(state["optimizer_updates"]))
        optimizer.publish()
    return state


def save_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    state: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
) -> None:
    """Write whole model tensors (global name, value) from one process, without an optimizer."""
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    _remove_own(partial)
    partial.mkdir(parents=True)
    _save({MODEL + name: tensor for name, tensor in tensors}, partial)
    _finish(partial, folder, {**state, "optimizer_updates": 0}, files or {})


def read_tensors(folder: Path, prefix: str = MODEL) -> Iterator[tuple[str, torch.Tensor]]:
    """Global tensors whose name in the checkpoint begins with `prefix`, one at a time: (name without it, value)."""
    read_state(folder)
    metadata = FileSystemReader(folder).read_metadata()
    for key, entry in metadata.state_dict_metadata.items():
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata):
            value = torch.empty(entry.size, dtype=entry.properties.dtype)
            _load({key: value}, folder, one_process=True)
            yield key.removeprefix(prefix), value


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON facts of a checkpoint.

    Raises:
        UserError: there is no complete checkpoint in this folder.
    """
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: expected a checkpoint (a folder with {STATE_FILE})") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected a JSON object")
    return state


def boxed_tensors(buckets: list[Bucket], optimizer: FlatAdamW | None) -> dict[str, torch.Tensor]:
    """This rank's part of every tensor of a checkpoint; the boxes share memory with the buffers."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype, list[Box]]] = {}

    def add(prefix: str, bucket: Bucket, vector: torch.Tensor, start: int) -> None:
        for slot in bucket.slots:
            entry = found.setdefault(prefix + slot.name, (slot.shard.global_shape, vector.dtype, []))
            entry[2].extend(boxes_of_slot(slot, vector, start))

    for bucket in buckets:
        add(MODEL, bucket, bucket.parameters, 0)
        if optimizer is not None and bucket.parameters.dtype != torch.float32:
            add(f"{OPTIMIZER}master/", bucket, bucket.master, bucket.owned[0])
    for bucket, start, _, moments in optimizer.state_vectors() if optimizer is not None else []:
        for kind in ("exp_avg", "exp_avg_sq"):
            add(f"{OPTIMIZER}{kind}/", bucket, moments[kind], bucket.owned[0] + start)
    return {name: BoxedTensor(shape, dtype, boxes) for name, (shape, dtype, boxes) in found.items()}


def _save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    with warnings.catch_warnings():
        # Without a process group torch assumes one process, which is what is meant.
        warnings.filterwarnings("ignore", message=".*single process.*")
        writer = FileSystemWriter(folder, sync_files=True)
        save(dict(tensors), storage_writer=writer, no_dist=not torch_dist.is_initialized())


def _load(tensors: dict[str, torch.Tensor], folder: Path, one_process: bool = False) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        alone = one_process or not torch_dist.is_initialized()
        load(dict(tensors), storage_reader=FileSystemReader(folder), no_dist=alone)


def _finish(partial: Path, folder: Path, state: Mapping[str, Any], files: Mapping[str, str]) -> None:
    for name, content in files.items():
        write_atomic(partial / name, content)
    write_atomic(partial / STATE_FILE, json.dumps(state, indent=2) + "\n")
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        _remove_own(replaced)
        folder.rename(replaced)
    partial.rename(folder)
    sync(folder.parent)
    _remove_own(replaced)


def _remove_own(folder: Path) -> None:
    """Remove what an earlier, interrupted save of ours left under a name that nothing else uses."""
    if folder.exists():
        shutil.rmtree(folder)


def _barrier() -> None:
    if torch_dist.is_initialized():
        torch_dist.barrier()
