"""What a launch makes of the store before any rank starts: the past is frozen there as on a disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_store import BUCKET, CheckpointStore
from s3_server import ProxyHandler, http_server

from data.plan import DataPlan
from launch.storage.remote import own, run_store
from launch.storage.task import LocalCheckpoint, UploadTask
from launch.train.prepare import PreparedRun, RunRequest, prepare_run, reason_not_to_train
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.skipped import SkippedBatches
from parallel.checkpoint_files import Manifest, describe_files, write_manifest

Prepare = Callable[..., PreparedRun]
SKIPPED = "- first: 14\n  end: 22\n  spike_step: 20\n"


@pytest.fixture
def prepare(store: CheckpointStore, small_file: Path, tmp_path: Path) -> Prepare:
    """Prepare the run `mine`, and give it back."""

    def call(*overrides: str, directory: str = "work", run: str | None = "mine") -> PreparedRun:
        place = [f"s3_upload.upload_s3_path=s3://{BUCKET}/team", f"s3_upload.endpoint_url={store.url}"]
        loaded = load_recipe(str(small_file), [*place, *overrides])
        prepared = prepare_run(RunRequest(loaded, run, tmp_path / directory / "runs"))
        prepared.lock.release()
        return prepared

    return call


def with_ranges(prepared: PreparedRun, entries: str) -> str:
    """The text of a run's recipe that has skipped nothing yet, with these entries of `data_skipped_ranges`."""
    text = prepared.folder.recipe_file.read_text()
    assert "data_skipped_ranges: []\n" in text
    return text.replace("data_skipped_ranges: []\n", f"data_skipped_ranges:\n{entries}")


def uploaded(prepared: PreparedRun, step: int, scratch: Path, recipe: str = "") -> None:
    """Put into the store what a run would have left of a step, but for its tensors."""
    folder = scratch / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe or prepared.folder.recipe_file.read_text())
    (folder / "state.json").write_text("{}")
    write_manifest(folder, Manifest(step, "", {}, describe_files([folder / "recipe.yaml", folder / "state.json"])))
    store = run_store(prepared.folder, prepared.recipe)
    assert store is not None
    own(store, prepared.folder)
    assert UploadTask(store, LocalCheckpoint.read(step, [folder]), "", (), 2).send()


def test_a_run_whose_disks_are_wiped_has_the_past_that_is_in_the_store(prepare: Prepare, tmp_path: Path) -> None:
    begun = prepare()
    assert (begun.state, begun.step) == ("new", 0)
    for step in (8, 16):
        uploaded(begun, step, tmp_path / "made")
    again = prepare()
    assert (again.state, again.step) == ("resumed", 16)
    assert "step 16 is saved" in str(reason_not_to_train(again, 12)) and reason_not_to_train(again, 17) is None
    before = begun.folder.recipe_file.read_bytes()
    with pytest.raises(UserError, match=r"going on after step 16 would change steps already taken: general\.seed"):
        prepare("general.seed=4")
    assert begun.folder.recipe_file.read_bytes() == before
    longer = prepare("tokens.train_steps=50", "optimizer.learning_rate_scheduler.lr_decay_starting_step=40")
    assert any(change.startswith("after step 16: tokens.train_steps") for change in longer.changes)


def test_what_a_rewind_left_in_the_store_is_not_the_runs_past(prepare: Prepare, tmp_path: Path) -> None:
    begun = prepare()
    uploaded(begun, 8, tmp_path / "made")
    uploaded(begun, 24, tmp_path / "made")
    begun.folder.recipe_file.write_text(with_ranges(begun, SKIPPED))
    assert prepare().step == 8
    # A step that is trained again, with the range, is.
    uploaded(begun, 24, tmp_path / "again", begun.folder.recipe_file.read_text())
    assert prepare().step == 24


def test_a_branch_that_went_back_itself_goes_on_from_the_store(prepare: Prepare, tmp_path: Path) -> None:
    parent = prepare(run="parent")
    folder = parent.folder.checkpoints / "8"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(with_ranges(parent, "- first: 3\n  end: 5\n  spike_step: 4\n"))
    plan = DataPlan.from_recipe(load_recipe(str(folder / "recipe.yaml")).recipe)
    write_manifest(folder, Manifest(8, plan.fingerprint_through(8), {}, describe_files([folder / "recipe.yaml"])))

    origin = f"checkpoints.resume_checkpoint_path={folder}"
    branch = prepare(origin)
    assert (branch.state, branch.step, str(SkippedBatches.of(branch.recipe))) == ("new", 8, "3–4")
    inherited = branch.folder.recipe_file.read_text()
    went_back = inherited.replace("spike_step: 4\n", f"spike_step: 4\n{SKIPPED}")
    branch.folder.recipe_file.write_text(went_back)
    uploaded(branch, 16, tmp_path / "made")
    again = prepare(origin)
    assert (again.state, again.step, str(SkippedBatches.of(again.recipe))) == ("resumed", 16, "3–4, 14–21")


def test_a_lost_folder_of_a_run_is_made_again_from_a_steps_recipe(prepare: Prepare, tmp_path: Path) -> None:
    uploaded(prepare(), 16, tmp_path / "made")
    with pytest.raises(UserError, match=r"belongs to another run.*put the recipe.yaml of one of its steps at .*other"):
        prepare(directory="other")
    lost = tmp_path / "other" / "runs" / "mine"
    lost.mkdir(parents=True, exist_ok=True)
    (lost / "recipe.yaml").write_bytes((tmp_path / "made" / "16" / "recipe.yaml").read_bytes())
    again = prepare(directory="other")
    assert (again.state, again.step) == ("resumed", 16)


@pytest.mark.parametrize("what", ["out", "another bucket"])
def test_a_store_that_does_not_answer_is_a_note_and_one_that_refuses_is_a_mistake_of_a_new_run_only(
    prepare: Prepare, store: CheckpointStore, tmp_path: Path, what: str
) -> None:
    begun = prepare()
    if what == "out":
        store.faults.is_out = True
        assert prepare(run="new").state == "new"
        (note,) = [note for note in prepare().notes if "upload_s3_path" in note]
    else:
        elsewhere = f"s3_upload.upload_s3_path=s3://nobodys/{tmp_path.name}"
        with pytest.raises(UserError, match=r"s3_upload.upload_s3_path: s3://nobodys.*NoSuchBucket.*s3_upload=null"):
            prepare(elsewhere, run="new")
        (note,) = [note for note in prepare(elsewhere).notes if "upload_s3_path" in note]
    assert note.endswith("training does not wait for it") and begun.folder.exists()


class Portal(ProxyHandler):
    """What a network shows to who is not logged in: a page, or the way to it."""

    status = 200

    def page(self) -> None:
        headers = {"Location": f"http://{self.headers['Host']}/login", "Content-Type": "text/html"}
        self.answer(self.status, headers if self.status != 200 else {}, b"<html>Welcome</html>")

    do_GET = do_HEAD = do_PUT = page


@pytest.mark.parametrize("status", [200, 301, 302, 307, 401])
def test_what_answers_but_is_no_store_is_a_mistake_of_a_new_run_and_a_note_of_one_that_goes_on(
    prepare: Prepare, status: int
) -> None:
    begun = prepare()
    with http_server(type("Handler", (Portal,), {"status": status})) as url:
        elsewhere = f"s3_upload.endpoint_url={url}"
        expected = "not as an S3 store does" if status == 200 else f"HTTP status {status}"
        with pytest.raises(UserError, match=rf"s3_upload.upload_s3_path: s3://{BUCKET}/team/new.*{expected}"):
            prepare(elsewhere, run="new")
        (note,) = [note for note in prepare(elsewhere).notes if "upload_s3_path" in note]
    assert expected in note and note.endswith("training does not wait for it") and begun.folder.exists()


@pytest.mark.parametrize("owner", [b"<html>", b"[" * 100_000, b"[]", b""])
def test_an_owner_that_cannot_be_read_is_named(prepare: Prepare, store: CheckpointStore, owner: bytes) -> None:
    prepare()
    store.client.put_object(Bucket=BUCKET, Key="team/mine/owner.json", Body=owner)
    with pytest.raises(UserError, match=r"team/mine/owner.json: damaged; expected which run"):
        prepare()
