"""Reading torch.distributed.checkpoint's files without running what they say.

torch reads `.metadata` with pickle, which calls whatever the file names, and a tensor that `.metadata` declares to be
bytes as well. Here only the classes that a checkpoint of ours consists of are found, and only tensors are accepted;
torch itself reads the tensors with `weights_only`.
"""

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from nanotron_recipes.errors import UserError
from parallel.checkpoint_files import METADATA_FILE, Manifest, compare_file, read_manifest

_ADMITTED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _CheckpointUnpickler(pickle.Unpickler):
    """Finds torch's checkpoint classes and dtypes, and nothing that could do anything."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle asks for by name; raises UnpicklingError for all that a checkpoint does not need."""
        if (module, name) in _ADMITTED:
            return super().find_class(module, name)
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class CheckpointReader(FileSystemReader):
    """torch's reader, for folders that anybody may have written.

    Raises UserError for a folder whose manifest is missing or does not fit `.metadata`, and for a `.metadata` that
    names anything but tensors in files of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        super().__init__(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What lies where; see `FileSystemReader.read_metadata`."""
        path, manifest = self._folder / METADATA_FILE, read_manifest(self._folder)
        entry = manifest.entry(METADATA_FILE)
        if entry is None:
            raise UserError(f"{path}: refused: the manifest does not list it")
        problem = compare_file(self._folder, entry, read=True)
        if problem is not None:
            raise UserError(f"{self._folder}: {problem}")
        try:
            with path.open("rb") as file:
                metadata = _CheckpointUnpickler(file).load()
            _check(metadata, path, manifest)
        except UserError:
            raise
        except Exception as error:  # a damaged pickle can end in any exception
            raise UserError(f"{path}: refused: not the table of a checkpoint ({error})") from error
        assert isinstance(metadata, Metadata)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _check(metadata: object, path: Path, manifest: Manifest) -> None:
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{path}: refused: not the table of a checkpoint")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{path}: refused: {name} is no tensor")
        # All of its bytes are in these files: nobody shall allocate more than that because a table says so.
        if math.prod(entry.size) * entry.properties.dtype.itemsize > manifest.num_bytes:
            raise UserError(f"{path}: refused: {name} is larger than all files together")
    files = {entry.name for entry in manifest.files}
    for index, place in metadata.storage_data.items():
        is_plain = isinstance(index, MetadataIndex) and isinstance(place, _StorageInfo)
        if not is_plain or place.relative_path not in files or place.transform_descriptors:
            raise UserError(f"{path}: refused: it names something other than a part of a file of the manifest")
