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
from parallel.checkpoint import load_checkpoint, read_state, read_tensors, save_tensors
from parallel.checkpoint_files import (
    MANIFEST_FILE,
    METADATA_FILE,
    STATE_FILE,
    describe_file,
    read_manifest,
    remove_own_files,
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


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (METADATA_FILE, None, r"\.metadata: cannot be read \(No such file or directory\)"),
        (METADATA_FILE, b"", r"\.metadata: 0 bytes instead of [\d,]+"),
        (METADATA_FILE, b"\x80\x02cposix\n", r"\.metadata: 9 bytes instead of [\d,]+"),
        (DATA_FILE, None, r"__0_0\.distcp: cannot be read \(No such file or directory\)"),
        (DATA_FILE, b"", r"__0_0\.distcp: 0 bytes instead of [\d,]+"),
    ],
)
def test_what_is_missing_or_cut_is_named_by_every_reader(
    file: str, content: bytes | None, reason: str, folder: Path
) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    (problem,) = verify_checkpoint_files(folder)
    assert re.fullmatch(reason, str(problem)) and problem.spoils
    readers = [lambda: list(read_tensors(folder)), lambda: load_checkpoint(folder, [], None)]
    if file == METADATA_FILE:
        readers.append(lambda: CheckpointReader(folder).read_metadata())
    for read in readers:
        with pytest.raises(UserError, match=f"{re.escape(str(folder))}: {reason}$"):
            read()


def test_a_folder_in_the_place_of_a_file_is_named(folder: Path) -> None:
    (folder / DATA_FILE).unlink()
    (folder / DATA_FILE).mkdir()
    (problem,) = verify_checkpoint_files(folder)
    assert str(problem) == f"{DATA_FILE}: is no file"


def test_a_checkpoint_under_the_name_of_another_step_is_refused(folder: Path) -> None:
    assert verify_checkpoint_files(folder, step=8) == []
    (problem,) = verify_checkpoint_files(folder.rename(folder.with_name("9")), step=9)
    assert str(problem) == "manifest.json: the state after step 8, called 9" and problem.spoils


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"step": "8", "optimizer_updates": 0}', "step: '8': expected a whole number"),
        ('{"step": true, "optimizer_updates": 0}', "step: true: expected a whole number"),
        ('{"step": -1, "optimizer_updates": 0}', "step: -1: expected a whole number"),
        ('{"step": 1e400, "optimizer_updates": 0}', "step: inf: expected a whole number"),
        ('{"step": 8, "optimizer_updates": [1]}', r"optimizer_updates: \[1\]: expected a whole number"),
        ('{"step": 8}', "optimizer_updates: null: expected a whole number"),
        ("[8]", r"\[8\]: expected a JSON object"),
        ("{", "damaged: not JSON"),
        ("[" * 100_000, "damaged: not JSON"),
        ("\udcff", "damaged: not JSON"),
    ],
)
def test_facts_of_the_wrong_kind_are_refused_by_name(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"state\.json: {reason}"):
        read_state(tmp_path)


def test_facts_of_another_step_than_the_manifests_are_refused(folder: Path) -> None:
    forge(folder, STATE_FILE, b'{"step": 7, "optimizer_updates": 0}')
    with pytest.raises(UserError, match=r"state\.json: step: 7: expected 8"):
        load_checkpoint(folder, [], None)


def test_a_manifest_that_is_nested_without_end_is_damaged(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text("[" * 100_000)
    with pytest.raises(UserError, match="damaged"):
        read_manifest(folder)


def test_of_a_link_to_a_checkpoint_only_the_link_is_removed(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "9"
    link.symlink_to(folder)
    assert remove_own_files(link) == []
    assert not link.is_symlink() and verify_checkpoint_files(folder) == []


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
    with pytest.raises(UserError, match=r"the tensors cannot be read: Weights only load failed$"):
        list(read_tensors(folder))
    assert not marker.exists()


@pytest.mark.parametrize("plant", ["bytes", "elsewhere", "no table", "too large"])
def test_a_table_may_only_name_tensors_in_its_own_files(folder: Path, plant: str) -> None:
    metadata: Any = CheckpointReader(folder).read_metadata()
    if plant == "bytes":  # torch would unpickle such an entry without weights_only
        metadata.state_dict_metadata["model/a.weight"] = BytesStorageMetadata()
    elif plant == "elsewhere":
        for place in metadata.storage_data.values():
            place.relative_path = "../secret"
    elif plant == "too large":  # a reader would allocate it
        metadata.state_dict_metadata["model/a.weight"].size = torch.Size([1 << 40, 1 << 20])
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
