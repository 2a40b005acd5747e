"""Checkpoints of global tensors, written by all ranks in parallel and read at any topology.

A checkpoint is a folder of torch.distributed.checkpoint with the tensors ``model/<name>``,
``optimizer/exp_avg/<name>``, ``optimizer/exp_avg_sq/<name>`` and, where the model is not float32,
``optimizer/master/<name>``, plus ``state.json`` and a manifest of all files (`parallel.checkpoint_files`).
It is written beside its final name and renamed when everything is on disk: what has the name is complete.
`parallel.checkpoint_saver` writes in the background of a training.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from nanotron_recipes.errors import UserError, user_error
from parallel.buckets import Bucket
from parallel.checkpoint_files import STATE_FILE, is_count, read_manifest, verify_checkpoint_files
from parallel.checkpoint_fit import require_same_model, whole_model
from parallel.checkpoint_reader import CheckpointReader
from parallel.checkpoint_tensors import (
    MASTER,
    MODEL,
    MOMENTS,
    OPTIMIZER,
    Tensors,
    float32_weights,
    readable_tensors,
    tensors_to_read,
    writable_tensors,
)
from parallel.checkpoint_writer import CheckpointInfo, tensor_bytes, write_checkpoint
from parallel.optimizer import FlatAdamW


def save_checkpoint(
    folder: Path,
    buckets: list[Bucket],
    optimizer: FlatAdamW | None,
    state: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint and wait for it; every rank of the world calls this with the same folder.

    Args:
        optimizer: None leaves the optimizer out (a model only).
        state: small JSON facts; `step` is the step whose result this is.
        files: text files to put beside the tensors, name -> content.

    Raises:
        SaveFailed: on every rank, with the reason.
    """
    if optimizer is None:
        tensors, counter = readable_tensors(buckets, None), 0
    else:
        tensors, counter = writable_tensors(buckets, optimizer, optimizer.context), optimizer.num_updates()
    _write(folder, tensors, {**state, "optimizer_updates": counter}, files)


def load_checkpoint(
    folder: Path, buckets: list[Bucket], optimizer: FlatAdamW | None, *, load_optimizer: bool = True
) -> dict[str, Any]:
    """Read what this rank needs of a checkpoint of any topology into its buffers; every rank calls this.

    Args:
        load_optimizer: False leaves AdamW's moments and counter as they are: at zero in a new optimizer. The float32
            values of the weights are read all the same where the checkpoint has them, also by a model of another dtype.

    Returns:
        The `state` it was saved with.

    Raises:
        UserError: the folder holds no complete checkpoint, one that was not written like this, or one of another model.
    """
    _require_files(folder, checksums=False, may_lie_elsewhere=True)
    state, step = read_state(folder), read_manifest(folder).step
    if state.get("step", 0) != step:
        raise user_error(f"expected {step}", source=str(folder / STATE_FILE), key="step", value=state.get("step"))
    entries = _entries(folder)
    there = {name: tuple(entry.size) for name, entry in entries.items()}
    has_master = any(name.startswith(MASTER) for name in there)
    moments = [f"{OPTIMIZER}{kind}/" for kind in MOMENTS] if optimizer is not None and load_optimizer else []
    if moments and not any(name.startswith(tuple(moments)) for name in there):
        raise UserError(f"{folder}: it holds a model without an optimizer; load_optimizer: false begins a fresh one")
    prefixes = [MODEL, *([MASTER] if has_master else []), *moments]
    require_same_model(folder, there, whole_model(buckets), prefixes)
    float32_from = float32_weights(_dtypes(entries))
    _load(tensors_to_read(buckets, optimizer, float32_from, moments=load_optimizer), folder)
    if optimizer is not None:
        if float32_from is None:
            optimizer.adopt_parameters()
        if load_optimizer:
            optimizer.set_num_updates(state["optimizer_updates"])
        optimizer.publish()
    return state


def wanted_tensors(
    folder: Path, buckets: list[Bucket], optimizer: FlatAdamW | None, *, load_optimizer: bool = True
) -> Tensors:
    """What `load_checkpoint` reads of a checkpoint on this rank; its table is enough to know.

    Raises:
        UserError: the table cannot be read.
    """
    float32_from = float32_weights(_dtypes(_entries(folder)))
    return tensors_to_read(buckets, optimizer, float32_from, moments=load_optimizer)


def save_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    state: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
) -> None:
    """Write whole model tensors (global name, value) from one process, without an optimizer."""
    _write(folder, {MODEL + name: tensor for name, tensor in tensors}, {**state, "optimizer_updates": 0}, files)


def read_tensors(folder: Path, prefix: str = MODEL) -> Iterator[tuple[str, torch.Tensor]]:
    """Global tensors whose name in the checkpoint begins with `prefix`, one at a time: (name without it, value).

    Raises:
        UserError: a file of the checkpoint is not what was written; all are looked at first.
    """
    _require_files(folder, checksums=True)
    metadata = CheckpointReader(folder).read_metadata()
    for key, entry in metadata.state_dict_metadata.items():
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata):
            value = torch.empty(entry.size, dtype=entry.properties.dtype)
            _load({key: value}, folder, one_process=True)
            yield key.removeprefix(prefix), value


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON facts of a checkpoint; `optimizer_updates` and, where it is there, `step` are whole numbers.

    Raises:
        UserError: there is no complete checkpoint in this folder, or its facts are not of these types.
    """
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: expected a checkpoint (a folder with {STATE_FILE})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: not JSON") from error
    if not isinstance(state, dict):
        raise user_error("expected a JSON object", source=str(path), value=state)
    for key, default in (("step", 0), ("optimizer_updates", None)):
        value = state.get(key, default)
        if not is_count(value):
            raise user_error("expected a whole number", source=str(path), key=key, value=value)
    return state


def _require_files(folder: Path, *, checksums: bool, may_lie_elsewhere: bool = False) -> None:
    problems = verify_checkpoint_files(folder, checksums=checksums)
    spoiling = [one for one in problems if one.spoils and not (may_lie_elsewhere and one.kind == "elsewhere")]
    if spoiling:
        raise UserError(f"{folder}: {spoiling[0]}")


def _write(folder: Path, tensors: Tensors, state: Mapping[str, Any], files: Mapping[str, str] | None) -> None:
    world = {"world_size": torch_dist.get_world_size() if torch_dist.is_initialized() else 1}
    write_checkpoint(CheckpointInfo(folder, state, files or {}, world), tensors, tensor_bytes(tensors))


def _entries(folder: Path) -> dict[str, TensorStorageMetadata]:
    """The tensors of a checkpoint."""
    entries = CheckpointReader(folder).read_metadata().state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _dtypes(entries: Mapping[str, TensorStorageMetadata]) -> dict[str, torch.dtype]:
    return {name: entry.properties.dtype for name, entry in entries.items()}


def _load(tensors: Tensors, folder: Path, one_process: bool = False) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        alone = one_process or not torch_dist.is_initialized()
        try:
            load(dict(tensors), storage_reader=CheckpointReader(folder), no_dist=alone)
        except CheckpointException as error:
            # Every rank fails with the reasons of all; the first sentence of one says it.
            reason = re.split(r"\.\s|\n", str(next(iter(error.failures.values()))[0]), maxsplit=1)[0]
            raise UserError(f"{folder}: the tensors cannot be read: {reason}") from error
