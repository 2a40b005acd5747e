"""Whatever happens to a file of a checkpoint is found; reading one runs nothing that it says."""

import io
import json
import pickle
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from nanotron_recipes.errors import UserError
from parallel.checkpoint import read_tensors, save_tensors
from parallel.checkpoint_files import (
    MANIFEST_FILE,
    METADATA_FILE,
    describe_file,
    read_manifest,
    verify_checkpoint_files,
    write_manifest,
)
from parallel.checkpoint_reader import CheckpointReader

TENSORS = {"a.weight": torch.arange(60, dtype=torch.float32).view(6, 10), "b.weight": torch.ones(7).bfloat16()}
DATA_FILE = "__0_0.distcp"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small whole checkpoint."""
    path = tmp_path / "8"
    save_tensors(path, TENSORS.items(), {"step": 8, "data": "fingerprint"}, {"recipe.yaml": "general: {}\n"})
    return path


def test_a_checkpoint_verifies_and_its_manifest_says_what_it_is(folder: Path) -> None:
    assert verify_checkpoint_files(folder) == []
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.data, manifest.world) == (8, "fingerprint", {"world_size": 1})
    names = {entry.name for entry in manifest.files}
    assert names == {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    assert manifest.num_bytes == sum((folder / name).stat().st_size for name in names)
    for name, tensor in read_tensors(folder):
        assert torch.equal(tensor, TENSORS[name])


def test_every_flipped_bit_and_every_truncation_is_found(folder: Path) -> None:
    generator = random.Random(11)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for _ in range(150):
            position, bit = generator.randrange(len(content)), generator.randrange(8)
            path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
            found = verify_checkpoint_files(folder)
            assert [problem.file for problem in found if problem.spoils] == [path.name], (path.name, position, bit)
        for _ in range(40):
            path.write_bytes(content[: generator.randrange(len(content))])
            assert [problem.file for problem in verify_checkpoint_files(folder) if problem.spoils] == [path.name]
        path.write_bytes(content)
    assert verify_checkpoint_files(folder) == []


def test_missing_and_extra_files_are_named(folder: Path) -> None:
    (folder / "note.txt").write_text("mine")
    (problem,) = verify_checkpoint_files(folder)
    assert str(problem) == "note.txt: not in the manifest" and not problem.spoils
    (folder / DATA_FILE).unlink()
    assert [problem.kind for problem in verify_checkpoint_files(folder)] == ["missing", "extra"]
    (folder / MANIFEST_FILE).unlink()
    assert [problem.kind for problem in verify_checkpoint_files(folder)] == ["manifest"]


def test_ranks_share_the_reading_and_together_read_everything(folder: Path) -> None:
    flipped = bytearray((folder / DATA_FILE).read_bytes())
    flipped[100] ^= 1
    (folder / DATA_FILE).write_bytes(flipped)
    found = [verify_checkpoint_files(folder, share=(rank, 3)) for rank in range(3)]
    assert sorted(len(problems) for problems in found) == [0, 0, 1]
    assert verify_checkpoint_files(folder, checksums=False) == []


class Marker:
    """Unpickled by an unsuspecting reader, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def forge(folder: Path, name: str, content: bytes) -> None:
    """Put `content` in a file and make the manifest fit: an attacker can do that."""
    (folder / name).write_bytes(content)
    manifest = read_manifest(folder)
    entries = tuple(describe_file(folder / entry.name) for entry in manifest.files)
    write_manifest(folder, type(manifest)(manifest.step, manifest.data, manifest.world, entries))
    assert verify_checkpoint_files(folder) == []


def test_a_malicious_table_runs_nothing(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    forge(folder, METADATA_FILE, pickle.dumps(Marker(marker)))
    with pytest.raises(UserError, match=r"refused: .*it asks for pathlib"):
        list(read_tensors(folder))
    assert not marker.exists()
    pickle.loads((folder / METADATA_FILE).read_bytes())
    assert marker.exists(), "the plant works"


def test_a_malicious_tensor_runs_nothing(folder: Path, tmp_path: Path) -> None:
    marker, planted = tmp_path / "ran", io.BytesIO()
    torch.save(Marker(marker), planted)
    content = (folder / DATA_FILE).read_bytes()
    forge(folder, DATA_FILE, planted.getvalue().ljust(len(content), b"\0"))
    with pytest.raises(BaseException, match=r"(?i)weights_only|unpickl|zip|archive"):
        list(read_tensors(folder))
    assert not marker.exists()


@pytest.mark.parametrize("plant", ["bytes", "elsewhere", "no table"])
def test_a_table_may_only_name_tensors_in_its_own_files(folder: Path, plant: str) -> None:
    metadata: Any = CheckpointReader(folder).read_metadata()
    if plant == "bytes":  # torch would unpickle such an entry without weights_only
        metadata.state_dict_metadata["model/a.weight"] = BytesStorageMetadata()
    elif plant == "elsewhere":
        for place in metadata.storage_data.values():
            place.relative_path = "../secret"
    else:
        metadata = {"state_dict_metadata": {}}
    forge(folder, METADATA_FILE, pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"refused: "):
        list(read_tensors(folder))


def test_a_checkpoint_tells_nothing_about_the_machine(folder: Path) -> None:
    assert str(folder.parent).encode() not in (folder / METADATA_FILE).read_bytes()


def test_a_folder_of_another_format_is_refused(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / MANIFEST_FILE).read_text())
    shutil.copytree(folder, tmp_path / "9")
    (tmp_path / "9" / MANIFEST_FILE).write_text(json.dumps({**content, "format": 99}))
    (problem,) = verify_checkpoint_files(tmp_path / "9")
    assert re.search(r"expected the manifest of a checkpoint, format 1", str(problem))
