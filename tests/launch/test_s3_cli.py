"""`checkpoints list|push|pull|prune` of a run that has a store."""

import fcntl
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event, main_thread
from typing import Any

import pytest
from checkpoint_store import BUCKET, CheckpointStore
from uploaded_run import make_checkpoint

from data.s3 import S3Prefix
from data.transfer import Watch
from launch.cli import main
from launch.status.checkpoint import newest_checkpoint
from launch.status.uploads import upload_status
from launch.storage import pull
from launch.storage.remote import local_identity
from launch.storage.state import GivenUp, NodeState, Uploaded, joint_state, write_state
from launch.storage.store import RunStore
from launch.train.run_folder import RunFolder
from launch.train.run_header import RunHeader
from launch.train.run_lock import RunLock
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe
from parallel.checkpoint_files import FileEntry, verify_checkpoint_files

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(store: CheckpointStore, small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """`runs/mine` with four steps, of which the store has none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    place = [f"s3_upload.upload_s3_path=s3://{BUCKET}/team", f"s3_upload.endpoint_url={store.url}"]
    recipe = load_recipe(str(small_file), [*place, "checkpoints.keep_last=1"]).recipe
    folder = RunFolder.of(Path("runs"), "mine", recipe)
    folder.path.mkdir(parents=True)
    folder.write_recipe(dump_yaml(recipe), RunHeader("small", "", "", run="a1"))
    for step in (8, 16, 24, 32):
        make_checkpoint(folder.checkpoints, step)
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """`nanotron-recipes checkpoints …` in this process: exit code, stdout, stderr."""

    def do(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main._run(["checkpoints", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return do


def listed(out: str) -> dict[int, tuple[str, str, str]]:
    """Of each step: why it is kept, whether it is here, whether it is in the store."""
    lines = [line for line in out.splitlines() if re.match(r"[│┃] +\d", line)]
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines]
    return {int(row[0]): (row[4], row[5], row[6]) for row in rows}


def test_what_is_missing_is_pushed_and_seen_in_the_list(
    store: CheckpointStore, run: RunFolder, call: Call, tmp_path: Path
) -> None:
    waits = ("not verified in the store", "yes", "no")
    assert listed(call("list", "mine")[1]) == {
        8: waits,
        16: waits,
        24: waits,
        32: ("the newest that verifies", "yes", "no"),
    }
    given_up = GivenUp(8, local_identity([run.checkpoints / "8"]), "4 steps waited")
    write_state(run.path, NodeState("a", "l", "s3", 1.0, given_up=(given_up,)))
    assert listed(call("list", "mine")[1])[8] == ("not kept: prune", "yes", "no")
    code, out, err = call("push", "mine", "--step", "16")
    said = rf"s3://{BUCKET}/team/mine/16/\w+: uploaded and read back, \S+ bytes\nnext: .* checkpoints list runs/mine\n"
    assert code == 0 and re.fullmatch(said, out), out + err
    assert listed(call("list", "mine")[1])[16] == ("not kept: prune", "yes", "yes")
    code, out, _ = call("push", "mine")
    assert code == 0 and out.count("uploaded and read back") == 3 and out.count("was there") == 1
    assert store.whole_steps("mine", tmp_path) == [8, 16, 24, 32]
    joint = joint_state(run.path)
    assert joint is not None and not joint.given_up, "status no longer says so"
    code, _, err = call("push", "mine", "--step", "9")
    assert (code, err) == (2, f"error: {run.checkpoints}: no checkpoint of step 9\n")


def test_what_is_damaged_here_is_named_and_the_rest_is_pushed(
    store: CheckpointStore, run: RunFolder, call: Call, tmp_path: Path
) -> None:
    part = run.checkpoints / "24" / "__0_0.distcp"
    part.write_bytes(bytes(part.stat().st_size))
    code, out, err = call("push", "mine")
    assert code == 1 and out.count("uploaded and read back") == 3
    assert err == f"error: {part}: its content is not what was written (SHA-256 differs)\n"
    assert store.whole_steps("mine", tmp_path) == [8, 16, 32]
    assert listed(call("list", "mine")[1])[24][1:] == ("yes", "in part")


def test_only_what_the_store_has_is_pruned_and_nothing_while_it_does_not_answer(
    store: CheckpointStore, run: RunFolder, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("prune", "mine")[1] == "nothing to delete: the policy keeps every checkpoint\n"
    call("push", "mine", "--step", "16")
    store.faults.is_out = True
    monkeypatch.setattr("data.s3.random.uniform", lambda low, high: 0.01)
    code, out, err = call("prune", "mine")
    assert code == 1 and out == "" and err.startswith("error: s3://")
    code, out, err = call("list", "mine")
    assert code == 0 and {step: row[2] for step, row in listed(out).items()} == dict.fromkeys([8, 16, 24, 32], "?")
    assert err.startswith("note: what the store has is not known: ")
    store.faults.is_out = False
    assert call("prune", "mine")[1] == "deleted runs/mine/checkpoints/16\n"
    assert run.steps() == [8, 24, 32]
    assert listed(call("list", "mine")[1])[16] == ("the store deletes nothing", "no", "yes")


def test_a_step_that_was_trained_again_is_not_taken_for_the_one_that_was_given_up_or_uploaded(
    store: CheckpointStore, run: RunFolder, call: Call
) -> None:
    before = ("of an earlier past", "4 steps waited")
    uploaded = Uploaded(32, "of an earlier past", 1.0, 1, 1.0)
    state = NodeState("a", "l", "s3", 1.0, uploaded=(uploaded,), given_up=(GivenUp(16, *before), GivenUp(24, *before)))
    write_state(run.path, replace(state, waiting=(16, 32)))
    assert listed(call("list", "mine")[1])[16] == ("not verified in the store", "yes", "no")
    assert call("prune", "mine")[1] == "nothing to delete: the policy keeps every checkpoint\n"
    newest, uploads = newest_checkpoint(run, []), upload_status(run.path)
    assert newest is not None and newest.in_store is False
    assert uploads is not None and uploads.given_up == [24], "16 waits"

    identities = {step: local_identity([run.checkpoints / str(step)]) for step in (16, 32)}
    state = replace(state, uploaded=(replace(uploaded, identity=identities[32]),))
    write_state(run.path, replace(state, given_up=(GivenUp(16, identities[16], "4 steps waited"),)))
    newest = newest_checkpoint(run, [])
    assert newest is not None and newest.in_store is True
    assert call("prune", "mine")[1] == "deleted runs/mine/checkpoints/16\n"


def test_the_newest_step_or_a_named_one_is_pulled(store: CheckpointStore, run: RunFolder, call: Call) -> None:
    call("push", "mine")
    kept = (run.checkpoints / "32" / "__0_0.distcp").read_bytes()
    shutil.rmtree(run.checkpoints)
    code, out, _ = call("pull", "mine")
    said = r"runs/mine/checkpoints/32: fetched and verified, \S+ bytes\nnext: .* pretrain "
    assert code == 0 and re.match(said, out), out
    assert run.steps() == [32] and verify_checkpoint_files(run.checkpoints / "32", step=32) == []
    assert (run.checkpoints / "32" / "__0_0.distcp").read_bytes() == kept
    assert call("pull", "mine")[1] == "runs/mine/checkpoints/32: is here, every file as it was written\n"
    (run.checkpoints / "32" / "__0_0.distcp").write_bytes(bytes(len(kept)))
    assert "fetched and verified" in call("pull", "mine", "--step", "32")[1]
    assert (run.checkpoints / "32" / "__0_0.distcp").read_bytes() == kept
    assert "fetched and verified" in call("pull", "mine", "--step", "8")[1] and run.steps() == [8, 32]
    code, _, err = call("pull", "mine", "--step", "9")
    assert (code, err) == (2, f"error: s3://{BUCKET}/team/mine/9: no checkpoint of this run is whole there\n")


@pytest.fixture
def one_at_a_time(run: RunFolder) -> None:
    """Files of a checkpoint are sent and fetched one after the other."""
    recipe = load_recipe(str(run.recipe_file), ["s3_upload.workers=1"]).recipe
    run.write_recipe(dump_yaml(recipe), RunHeader("small", "", "", run="a1"))


def interrupt_once_until(stop: Event, calls: list[str]) -> None:
    """^C during the first call, while the others are queued; what is called goes on when it is told to stop, or long
    after."""
    if len(calls) == 1:
        time.sleep(0.3)
        signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
    stop.wait(3)


@pytest.mark.usefixtures("one_at_a_time")
def test_an_interrupt_ends_a_push_at_once(
    store: CheckpointStore, run: RunFolder, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    send = RunStore.send

    def interrupted(self: RunStore, path: Path, name: str, entry: FileEntry) -> None:
        calls.append(name)
        interrupt_once_until(self._sending.watch.stop, calls)
        send(self, path, name, entry)

    monkeypatch.setattr(RunStore, "send", interrupted)
    assert call("push", "mine")[0] == 130
    assert list(store.objects()) == ["team/mine/owner.json"]


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("end", ["interrupt", "damaged object"])
def test_an_interrupt_and_the_first_error_end_a_pull_at_once(
    end: str, store: CheckpointStore, run: RunFolder, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("push", "mine", "--step", "32")
    shutil.rmtree(run.checkpoints / "32")
    calls: list[str] = []
    bring = pull._bring

    def ended(objects: S3Prefix, entry: FileEntry, folder: Path, watch: Watch) -> None:
        calls.append(entry.name)
        if end == "interrupt":
            interrupt_once_until(watch.stop, calls)
        elif len(calls) == 1:
            raise UserError("its content is not what its manifest says")
        else:
            watch.stop.wait(3)
        bring(objects, entry, folder, watch)

    monkeypatch.setattr(pull, "_bring", ended)
    assert call("pull", "mine")[0] == (130 if end == "interrupt" else 2)
    left = [file.name for file in (run.checkpoints / "32.partial").glob("*")]
    assert all(name.endswith(".part") for name in left), f"fetched after the end: {left}"


@pytest.mark.usefixtures("one_at_a_time")
def test_a_damaged_object_leaves_what_can_be_used_and_an_older_step_is_named(
    store: CheckpointStore, run: RunFolder, call: Call
) -> None:
    call("push", "mine")
    shutil.rmtree(run.checkpoints)
    objects = store.objects("team/mine/32/")
    size, key = sorted((len(body), key) for key, body in objects.items() if "/." not in key and "manifest" not in key)[
        0
    ]
    store.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(size))
    code, out, err = call("pull", "mine")
    partial = run.checkpoints / "32.partial"
    assert (code, out) == (2, "") and f"{key}: its content is not what its manifest says (SHA-256 differs); " in err
    assert f"; {partial} keeps what has come, and the next pull goes on from it; " in err and any(partial.iterdir())
    assert err.endswith("; step 24 is whole there too: nanotron-recipes checkpoints pull runs/mine --step 24\n")
    assert "fetched and verified" in call("pull", "mine", "--step", "24")[1]
    store.client.put_object(Bucket=BUCKET, Key=key, Body=objects[key])
    assert "fetched and verified" in call("pull", "mine")[1] and not partial.exists()


def test_nothing_is_left_of_a_pull_that_brought_nothing(store: CheckpointStore, run: RunFolder, call: Call) -> None:
    call("push", "mine", "--step", "32")
    shutil.rmtree(run.checkpoints)
    for key, body in store.objects("team/mine/32/").items():
        if "/.sent/" not in key and "manifest" not in key:
            store.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(len(body) + 1))
    code, _, err = call("pull", "mine")
    assert code == 2 and "bytes, and its manifest says" in err and "keeps what" not in err and "too:" not in err
    assert [path for path in run.checkpoints.glob("*") if any(path.iterdir())] == [] and run.steps() == []


def test_a_run_that_is_trained_and_a_run_without_a_store_are_refused(
    store: CheckpointStore, run: RunFolder, call: Call, small_file: Path
) -> None:
    lock = RunLock.acquire(run.path, "another")
    try:
        for action, meanwhile in (("push", "uploads its checkpoints itself"), ("pull", "fetches what it needs")):
            code, _, err = call(action, "mine")
            assert code == 2 and f"trains this run, and {meanwhile}" in err
    finally:
        lock.release()
    run.write_recipe(dump_yaml(load_recipe(str(small_file)).recipe), RunHeader("small", "", "", run="a1"))
    code, _, err = call("push", "mine")
    assert code == 2
    assert err == f"error: {run.recipe_file}: s3_upload.upload_s3_path: expected s3://bucket/prefix, there is none\n"
    code, _, err = call("list", "mine", "--step", "8")
    assert code == 2 and "--step: checkpoints list looks at all steps" in err


def test_a_pull_that_has_no_room_or_is_not_alone_says_so_and_leaves_nothing_under_the_steps_name(
    store: CheckpointStore, run: RunFolder, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("push", "mine", "--step", "32")
    shutil.rmtree(run.checkpoints / "32")
    partial = run.checkpoints / "32.partial"
    with monkeypatch.context() as patch:
        patch.setattr("launch.storage.pull.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        code, _, err = call("pull", "mine")
    assert code == 1 and re.fullmatch(rf"error: {partial}: no room: 0\.000 GB are to come, .*\n", err), err
    assert not partial.exists(), "nothing has come"
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    code, _, err = call("pull", "mine")
    os.close(descriptor)
    assert (code, err) == (2, f"error: {partial}: another process fetches this checkpoint; wait for it\n")
    victim = run.path / "precious"
    victim.write_text("mine")
    (partial / ".__0_0.distcp.part").symlink_to(victim.absolute())
    code, _, err = call("pull", "mine")
    assert code == 1 and "error: runs/mine/checkpoints/32" in err and victim.read_text() == "mine"
    (partial / ".__0_0.distcp.part").unlink()
    assert run.steps() == [8, 16, 24] and call("pull", "mine")[0] == 0 and run.steps() == [8, 16, 24, 32]


def test_a_step_that_a_run_deletes_while_it_is_listed_is_left_out(
    store: CheckpointStore, run: RunFolder, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.cli import checkpoints_in_store

    before = checkpoints_in_store.steps_in_store

    def deleting(*arguments: Any) -> Any:
        shutil.rmtree(run.checkpoints / "8")
        return before(*arguments)

    monkeypatch.setattr(checkpoints_in_store, "steps_in_store", deleting)
    code, out, err = call("list", "mine")
    assert (code, err) == (0, "") and set(listed(out)) == {16, 24, 32}
