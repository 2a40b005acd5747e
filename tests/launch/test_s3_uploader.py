"""The uploader of a node and what it leaves in a real store: parts, read-back, nodes that each send their own."""

import os
import threading
import time
from pathlib import Path

import pytest
from checkpoint_store import BUCKET, CheckpointStore
from uploaded_run import begun_run, make_checkpoint, uploaded, uploading, wait_for

from data.s3 import Patience
from data.transfer import Stopped, TransferFailed, Watch
from launch.storage.pull import Pull
from launch.storage.remote import check_owner, local_identity, own, remote_checkpoints
from launch.storage.state import GivenUp, joint_state, read_state, state_file
from launch.storage.store import ENDLESS, DamagedFile, RunStore, Sending, StoreFailed
from launch.storage.uploader import Uploader
from launch.train.run_folder import RunFolder
from launch.train.run_header import RunHeader
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.checkpoints import S3Upload
from parallel.checkpoint_files import (
    FileEntry,
    describe_file,
    verify_checkpoint_files,
    verify_checkpoint_parts,
)

QUICK = Patience(attempts=ENDLESS.attempts, first_seconds=0.01, longest_seconds=0.05)
MIB = 1 << 20
PART = 5 * MIB
"""The least that a store takes as a part."""


@pytest.fixture
def upload(store: CheckpointStore) -> S3Upload:
    return S3Upload(upload_s3_path=f"s3://{BUCKET}/team", endpoint_url=store.url, max_backlog=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of hundredths of a second."""
    monkeypatch.setattr("launch.storage.uploader.ENDLESS", QUICK)
    monkeypatch.setattr("launch.storage.uploader.LOOK_SECONDS", 0.02)
    monkeypatch.setattr("launch.storage.uploader.OTHERS_SECONDS", 0.1)
    monkeypatch.setattr("launch.storage.trouble.TROUBLE_SECONDS", 0.1)


def patient(upload: S3Upload, watch: Watch | None = None) -> RunStore:
    return RunStore(upload, "run", patience=QUICK, sending=Sending(watch or Watch()), part_bytes=PART)


def random_file(path: Path, size: int) -> FileEntry:
    path.write_bytes(os.urandom(size))
    return describe_file(path)


@pytest.fixture
def run(small_file: Path, tmp_path: Path, upload: S3Upload) -> tuple[RunFolder, Recipe]:
    return begun_run(tmp_path, small_file, upload)


def test_parts_that_are_cut_refused_or_changed_on_the_way_are_sent_until_what_arrived_is_what_was_sent(
    store: CheckpointStore, upload: S3Upload, tmp_path: Path
) -> None:
    entry = random_file(tmp_path / "big", 2 * PART + 12345)
    store.faults.next = ["cut", "500", "cut", "503", "cut"]
    store.faults.corrupts = 7
    notes: list[str] = []
    arrived = 0

    def advance(count: int) -> None:
        nonlocal arrived
        arrived += count

    patient(upload, Watch(advance, notes.append)).send(tmp_path / "big", "8/x/big", entry)
    assert store.objects("team/run/8/x/big") == {"team/run/8/x/big": (tmp_path / "big").read_bytes()}
    assert store.uploads_left() == [] and store.faults.failed[:5] == ["cut", "500", "cut", "503", "cut"]
    assert any("SlowDown" in note for note in notes) and any("is not what was sent (sha256)" in note for note in notes)
    assert arrived >= entry.size
    before = len(store.faults.seen)
    patient(upload).send(tmp_path / "big", "8/x/big", entry)
    assert not any(line.startswith(("PUT", "POST")) for line in store.faults.seen[before:]), "it is read, not sent"


def test_a_file_that_a_disk_has_changed_is_never_sent_and_leaves_nothing(
    store: CheckpointStore, upload: S3Upload, tmp_path: Path
) -> None:
    for name, size in (("small", 1000), ("big", 2 * PART)):
        entry = random_file(tmp_path / name, size)
        content = bytearray((tmp_path / name).read_bytes())
        content[-1] ^= 1
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DamagedFile, match=rf"{name}: its content is not what was written"):
            patient(upload).send(tmp_path / name, f"8/x/{name}", entry)
    assert store.objects() == {} and store.uploads_left() == []


def test_what_was_begun_by_a_process_that_was_killed_is_taken_away(
    store: CheckpointStore, upload: S3Upload, tmp_path: Path
) -> None:
    entry = random_file(tmp_path / "big", PART + 1)
    for key in ("team/run/8/x/big", "team/run/8/x/big-other"):
        store.client.create_multipart_upload(Bucket=BUCKET, Key=key)
    patient(upload).send(tmp_path / "big", "8/x/big", entry)
    assert store.uploads_left() == ["team/run/8/x/big-other"]


def test_a_stop_ends_an_upload_in_an_outage_and_leaves_the_store_as_it_was(
    store: CheckpointStore, upload: S3Upload, tmp_path: Path
) -> None:
    entry, watch = random_file(tmp_path / "small", 1000), Watch()
    store.faults.is_out = True
    threading.Timer(0.3, watch.stop.set).start()
    with pytest.raises(Stopped):
        patient(upload, watch).send(tmp_path / "small", "8/x/small", entry)
    assert store.objects() == {}


def test_who_asks_is_told_at_once_that_there_is_no_access_and_soon_that_there_is_no_answer(
    store: CheckpointStore, upload: S3Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreFailed, match="NoSuchBucket") as failure:
        RunStore(upload.model_copy(update={"upload_s3_path": "s3://other/x"}), "run").check_bucket()
    assert failure.value.is_refusal
    store.faults.share, store.faults.kinds = 1.0, ("cut",)
    with pytest.raises(StoreFailed, match="s3://other/x/run: ") as failure:
        RunStore(upload.model_copy(update={"upload_s3_path": "s3://other/x"}), "run").check_bucket()
    assert failure.value.is_refusal, "the answer says only 404"
    store.faults.share = 0.0
    store.faults.is_out = True
    soon = Patience(attempts=3, first_seconds=0.01)
    with pytest.raises(StoreFailed) as failure:
        RunStore(upload, "run", patience=soon).folders()
    assert not failure.value.is_refusal and len(store.faults.seen) >= 3


def test_steps_are_uploaded_as_they_appear_and_the_manifest_is_there_last(
    store: CheckpointStore, run: tuple[RunFolder, Recipe], upload: S3Upload, tmp_path: Path
) -> None:
    folder, recipe = run
    make_checkpoint(folder.checkpoints, 8)
    store.faults.share = 0.3
    with uploading(Uploader(folder, recipe, "a", ("a",), "l1")):
        for step in (16, 24, 32):
            wait_for(lambda: uploaded(folder)[-1:] == [step - 8])  # noqa: B023  # called at once
            make_checkpoint(folder.checkpoints, step)
            assert set(store.whole_steps("run", tmp_path)) >= set(uploaded(folder))
        wait_for(lambda: uploaded(folder) == [8, 16, 24, 32])
    assert store.whole_steps("run", tmp_path) == [8, 16, 24, 32]
    assert store.faults.failed
    state = read_state(folder.path, "a")
    assert state is not None and state.waiting == () and not any(one.was_there for one in state.uploaded)

    roomy = recipe.model_copy(update={"s3_upload": upload.model_copy(update={"max_backlog": 4})})
    # The next launch believes what is written of them, and one that finds nothing written asks the store.
    for launch, was_there in (("l2", [False] * 4), ("l3", [True] * 4)):
        before = len(store.faults.seen)
        with uploading(Uploader(folder, roomy, "a", ("a",), launch)):
            wait_for(lambda: (found := read_state(folder.path, "a")) and found.launch_id == launch)  # noqa: B023
            wait_for(lambda: uploaded(folder) == [8, 16, 24, 32] and not read_state(folder.path, "a").waiting)
        state = read_state(folder.path, "a")
        assert state is not None and [one.was_there for one in state.uploaded] == was_there
        assert not any(line.startswith(("PUT", "POST")) for line in store.faults.seen[before:])
        state_file(folder.path, "a").unlink()


def test_what_it_is_told_to_give_up_is_named_and_not_sent_and_the_rest_arrives_after_an_outage(
    store: CheckpointStore, run: tuple[RunFolder, Recipe], tmp_path: Path
) -> None:
    folder, recipe = run
    store.faults.is_out = True
    with uploading(Uploader(folder, recipe, "a", ("a",), "l1")) as uploader:
        for step in (8, 16, 24):
            make_checkpoint(folder.checkpoints, step)
        wait_for(lambda: (state := read_state(folder.path, "a")) and state.waiting == (8, 16, 24) and state.sending)
        given_up = GivenUp(16, local_identity([folder.checkpoints / "16"]), "too many")
        for _ in range(3):
            uploader.give_up(given_up)
        wait_for(lambda: read_state(folder.path, "a").waiting == (8, 24))
        wait_for(lambda: "127.0.0.1" in read_state(folder.path, "a").problem)
        store.faults.is_out = False
        wait_for(lambda: uploaded(folder) == [8, 24])
        uploader.give_up(GivenUp(8, local_identity([folder.checkpoints / "8"]), "too late"))
    assert store.whole_steps("run", tmp_path) == [8, 24]
    state, joint = read_state(folder.path, "a"), joint_state(folder.path)
    assert state is not None and state.given_up == (given_up,)
    assert joint is not None and not joint.problems and not joint.waiting and joint.newest == 24


def test_each_node_sends_what_it_holds_copies_once_and_the_step_is_whole_when_the_last_one_has(
    store: CheckpointStore, small_file: Path, upload: S3Upload, tmp_path: Path
) -> None:
    names = ("a", "b", "c")
    recipe = load_recipe(str(small_file), [f"checkpoints.checkpoints_path={tmp_path}/disks/{{node}}"]).recipe
    recipe = recipe.model_copy(update={"s3_upload": upload})
    folders = [RunFolder.of(tmp_path / "runs", "run", recipe, node) for node in names]
    folders[0].path.mkdir(parents=True)
    folders[0].write_recipe("general: {}\n", RunHeader("small", "", "", run="a1"))
    for disk in names:
        (tmp_path / "disks" / disk).mkdir(parents=True)
        folders[names.index(disk)].checkpoints.mkdir()
    make_checkpoint(tmp_path / "made", 8, names, copies=2)
    for node in names:
        (tmp_path / "made" / node / "8").rename(tmp_path / "disks" / node / "run" / "8")
    uploaders = [Uploader(folder, recipe, node, names, "l") for folder, node in zip(folders, names, strict=True)]
    with uploading(uploaders[0]), uploading(uploaders[1]):
        wait_for(lambda: len([key for key in store.objects("team/run/8") if "/.sent/" in key]) == 2)
        time.sleep(0.5)
        assert store.whole_steps("run", tmp_path) == [] and uploaded(folders[0]) == []
        with uploading(uploaders[2]):
            wait_for(lambda: all(uploaded(folders[0], node) == [8] for node in names))
    assert store.whole_steps("run", tmp_path) == [8]
    parts = [line for line in store.faults.seen if line.startswith("PUT") and ".distcp" in line]
    assert len(parts) == len(set(parts)) == 3, "each part was sent by one node"

    # Two of the nodes are lost; another takes their place, and both take their share from the store.
    for number, disk in enumerate((tmp_path / "new" / "a", tmp_path / "new" / "d")):
        (found,) = remote_checkpoints(patient(upload), 8)
        Pull(patient(upload), found, disk / "8", (number, 2)).run()
    problems = verify_checkpoint_parts([tmp_path / "new" / "a" / "8", tmp_path / "new" / "d" / "8"], step=8)
    assert problems == []


def test_a_step_that_one_node_gave_up_is_of_no_use_to_the_others(
    store: CheckpointStore, small_file: Path, upload: S3Upload, tmp_path: Path
) -> None:
    names = ("a", "b")
    recipe = load_recipe(str(small_file), [f"checkpoints.checkpoints_path={tmp_path}/disks/{{node}}"]).recipe
    recipe = recipe.model_copy(update={"s3_upload": upload})
    folders = [RunFolder.of(tmp_path / "runs", "run", recipe, node) for node in names]
    folders[0].path.mkdir(parents=True)
    folders[0].write_recipe("general: {}\n", RunHeader("small", "", "", run="a1"))
    make_checkpoint(tmp_path / "made", 8, names)
    for folder, node in zip(folders, names, strict=True):
        folder.checkpoints.mkdir(parents=True)
        (tmp_path / "made" / node / "8").rename(folder.checkpoints / "8")
    part = folders[0].checkpoints / "8" / "__0_0.distcp"
    part.write_bytes(bytes(part.stat().st_size))
    first, second = (Uploader(folder, recipe, node, names, "l") for folder, node in zip(folders, names, strict=True))
    with uploading(first), uploading(second):
        wait_for(lambda: (state := read_state(folders[1].path, "b")) and state.given_up)
    state = read_state(folders[1].path, "b")
    assert state is not None and "__0_0.distcp: its content is not what was written" in state.given_up[0].reason
    assert store.whole_steps("run", tmp_path) == []


def test_a_step_that_is_trained_again_is_another_checkpoint_beside_the_first(
    store: CheckpointStore, run: tuple[RunFolder, Recipe], upload: S3Upload, tmp_path: Path
) -> None:
    folder, recipe = run
    make_checkpoint(folder.checkpoints, 8)
    first = local_identity([folder.checkpoints / "8"])
    with uploading(Uploader(folder, recipe, "a", ("a",), "l")):
        wait_for(lambda: uploaded(folder) == [8])
        (folder.checkpoints / "8").rename(tmp_path / "gone")
        make_checkpoint(folder.checkpoints, 8)
        wait_for(lambda: uploaded(folder) == [8, 8])
    found = {one.identity: one for one in remote_checkpoints(patient(upload), 8)}
    assert set(found) == {first, local_identity([folder.checkpoints / "8"])}
    Pull(patient(upload), found[first], tmp_path / "pulled" / "8").run()
    assert verify_checkpoint_files(tmp_path / "pulled" / "8", step=8) == []
    name = "__0_0.distcp"
    assert (tmp_path / "pulled" / "8" / name).read_bytes() == (tmp_path / "gone" / name).read_bytes()


def test_a_pull_replaces_what_is_damaged_fetches_no_more_than_that_and_refuses_a_changed_object(
    store: CheckpointStore, run: tuple[RunFolder, Recipe], upload: S3Upload, tmp_path: Path
) -> None:
    folder, recipe = run
    make_checkpoint(folder.checkpoints, 8)
    with uploading(Uploader(folder, recipe, "a", ("a",), "l")):
        wait_for(lambda: uploaded(folder) == [8])
    place = folder.checkpoints / "8"
    (found,) = remote_checkpoints(patient(upload), 8)
    damaged = place / "__0_0.distcp"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert Pull(patient(upload), found, place).run() == damaged.stat().st_size
    assert verify_checkpoint_files(place, step=8) == []
    key = f"team/run/{found.folder}__0_0.distcp"
    store.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(damaged.stat().st_size))
    damaged.unlink()
    with pytest.raises(UserError, match=r"__0_0.distcp: its content is not what its manifest says"):
        Pull(patient(upload), found, place).run()
    store.client.delete_object(Bucket=BUCKET, Key=key)
    with pytest.raises((UserError, TransferFailed), match=r"__0_0.distcp"):
        Pull(patient(upload), found, place).run()


def test_the_place_of_another_run_is_refused(
    store: CheckpointStore, run: tuple[RunFolder, Recipe], upload: S3Upload
) -> None:
    folder, _ = run
    own(patient(upload), folder)
    own(patient(upload), folder)
    check_owner(patient(upload), folder, "a1")
    with pytest.raises(UserError, match=rf"s3://{BUCKET}/team/run: belongs to another run, begun in {folder.path}"):
        check_owner(patient(upload), folder, "b2")
