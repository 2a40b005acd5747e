"""After a loss spike a run goes back and on without the batches around it, as if it had never read them."""

import errno
import json
import os
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from guard_plants import bad_batch
from hypothesis import given
from hypothesis import strategies as st
from parity_cases import grid
from small_pretraining import curve

from data.plan import DataPlan
from launch.train import rank, rewind
from launch.train.guards import SpikeDetector
from launch.train.metrics import read_metrics
from launch.train.prepare import PreparedRun, RunRequest, prepare_run
from launch.train.run_folder import RunFolder
from launch.train.signals import StopRequest
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.schema.data import SkippedRange
from nanotron_recipes.schema.guards import Guards
from nanotron_recipes.skipped import SkippedBatches, with_ranges
from parallel.checkpoint import read_tensors
from parallel.process_groups import init_process_group
from parallel.rank_pool import RankFailure, RankPool

STEPS, BAD = 26, 20
SETTINGS = (
    f"tokens.train_steps={STEPS}",
    "tokens.val_check_interval=-1",
    "checkpoints.checkpoint_interval=3",
    "guards.loss_spike_window=5",
    "guards.loss_spike_threshold=6",
    "guards.rewind_after_spike=true",
    "guards.rewind_skip_before=6",
    "guards.rewind_skip_after=2",
)
"""The spike of step 20 leads back to step 12, over the checkpoints of steps 15 and 18, and skips batches 14 to 21."""
RANGE = {"first": 14, "end": 22, "spike_step": BAD}
FROM_THE_START = "data_skipped_ranges=[{first: 14, end: 22}]"


def train_on_rank(recipe_file: Path, plant: Callable[[pytest.MonkeyPatch], None] | None) -> None:
    recipe = load_recipe(str(recipe_file)).recipe
    folder = RunFolder.of(recipe_file.parents[1], recipe_file.parent.name, recipe)
    device = torch.device("cpu")
    init_process_group(device)
    with pytest.MonkeyPatch.context() as patch:
        if plant is not None:
            plant(patch)
        arguments = Namespace(stop_after=None, launch_id="test", job_launch=None, node_name="here")
        rank._train_run(folder, recipe, device, arguments, StopRequest(), "test")


def spiking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DataPlan, "step", bad_batch(BAD))


class Runs:
    """Runs of the small recipe in a folder of their own, as launches of `pretrain` in the ranks of the pool."""

    def __init__(self, folder: Path, file: Path, pool: RankPool) -> None:
        self.folder = folder
        self._file = file
        self._pool = pool

    def prepare(self, name: str | None, *settings: str) -> PreparedRun:
        """What a launch does before it starts its ranks."""
        loaded = load_recipe(str(self._file), [*SETTINGS, *settings])
        prepared = prepare_run(RunRequest(loaded, name, self.folder))
        prepared.lock.release()
        return prepared

    def launch(
        self, name: str, *settings: str, plant: Callable[[pytest.MonkeyPatch], None] | None = None, ranks: int = 1
    ) -> Path:
        """Start the run, or go on with it; returns its folder."""
        folder = self.prepare(name, *settings).folder
        self._pool.run(ranks, train_on_rank, folder.recipe_file, plant)
        return folder.path


@pytest.fixture
def runs(tmp_path: Path, small_file: Path, pool: RankPool) -> Runs:
    return Runs(tmp_path, small_file, pool)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, small_file: Path, rank_pool: RankPool) -> Path:
    """A run on one rank that skipped the batches from the start, and never read the bad one."""
    return Runs(tmp_path_factory.mktemp("undisturbed"), small_file, rank_pool).launch("plain", FROM_THE_START)


def tensors(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return dict(read_tensors(run / "checkpoints" / str(step), ""))


def assert_same_run(run: Path, other: Path) -> None:
    """Bit by bit: every step's record, every checkpoint, weights and optimizer."""
    assert curve(read_metrics(run / "metrics.jsonl").steps) == curve(read_metrics(other / "metrics.jsonl").steps)
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (run, other)]
    assert names[0] == names[1]
    ours, theirs = tensors(run), tensors(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(run / "metrics.jsonl").events if event["event"] == name]


def ranges(run: Path) -> list[dict[str, Any]]:
    recipe = load_recipe(str(run / "recipe.yaml")).recipe
    return [skipped.model_dump() for skipped in recipe.data_skipped_ranges]


def test_from_the_checkpoint_on_a_run_is_as_if_it_had_skipped_the_batches_from_the_start(
    spiked: Path, undisturbed: Path
) -> None:
    run = spiked
    assert_same_run(run, undisturbed)
    assert [event["step"] for event in events(run, "spike")] == [BAD] and events(undisturbed, "spike") == []
    (event,) = events(run, "rewind")
    expected = {"step": BAD, "to": 12, "skipped": [14, 22], "reason": None, "refused": {}}
    assert event == {"event": "rewind", **expected}
    assert ranges(run) == [RANGE]
    text = (run / "recipe.yaml").read_text()
    assert "# change: after step 12: batches 14 to 21 are skipped, for the loss spike of step 20\n" in text
    assert (run / "checkpoints" / "15" / "recipe.yaml").read_text() == text
    assert [record.tokens for record in read_metrics(run / "metrics.jsonl").steps] == [
        step * 24 * 64 for step in range(1, STEPS + 1)
    ]


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory, small_file: Path, rank_pool: RankPool) -> Path:
    """A run that went back, on one rank; nobody changes it."""
    return Runs(tmp_path_factory.mktemp("spiked"), small_file, rank_pool).launch("spiked", plant=spiking)


@pytest.fixture
def gone_back(runs: Runs, spiked: Path) -> Path:
    """A copy of it beside the other runs of a test."""
    return Path(shutil.copytree(spiked, runs.folder / "small-1"))


def test_a_recipe_that_does_not_know_the_ranges_goes_on_with_the_run(runs: Runs, gone_back: Path) -> None:
    assert runs.prepare(None, f"tokens.train_steps={STEPS}").folder.path == gone_back
    assert ranges(gone_back) == [RANGE]
    runs.launch("small-1", f"tokens.train_steps={STEPS + 2}")
    assert ranges(gone_back) == [RANGE]
    assert read_metrics(gone_back / "metrics.jsonl").steps[-1].step == STEPS + 2
    with pytest.raises(UserError, match=r"steps already taken: data_skipped_ranges: '14–21' → '5–6, 14–21'"):
        runs.prepare("small-1", "data_skipped_ranges=[{first: 5, end: 7}]")


def test_a_branch_that_goes_on_inherits_the_ranges(runs: Runs, gone_back: Path) -> None:
    parent = f"checkpoints.resume_checkpoint_path={gone_back / 'checkpoints' / '24'}"
    assert ranges(runs.prepare("branch", parent).folder.path) == [RANGE]
    assert ranges(runs.prepare("anew", parent, "checkpoints.load_lr_scheduler=false").folder.path) == []


def test_a_branch_of_a_checkpoint_on_a_nodes_own_disk_inherits_them_too(
    runs: Runs, gone_back: Path, tmp_path: Path
) -> None:
    shutil.copytree(gone_back / "checkpoints" / "24", tmp_path / "disks" / "a" / "24")
    parent = f"checkpoints.resume_checkpoint_path={tmp_path}/disks/{{node}}/24"
    assert ranges(runs.prepare("branch", parent).folder.path) == [RANGE]


long = partial(pytest.param, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("ranks", "overlay"),
    [
        (2, (*grid(dp=2, zero=1), "model.dtype=bfloat16")),
        long(2, grid(dp=2)),
        long(2, grid(tp=2)),
        long(2, grid(pp=2)),
        long(8, grid(dp=2, pp=2, tp=2, zero=1)),
    ],
    ids=str,
)
def test_at_every_topology_too(ranks: int, overlay: tuple[str, ...], runs: Runs) -> None:
    plain = runs.launch("plain", FROM_THE_START, *overlay, ranks=ranks)
    run = runs.launch("spiked", *overlay, plant=spiking, ranks=ranks)
    assert_same_run(run, plain)
    assert ranges(run) == [RANGE]


def kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_before_anything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rewind, "_set_aside", kill)


def killed_among_the_checkpoints(patch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def rename_one(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if path.name == "18" and str(target).endswith(".replaced"):
            kill()
        return moved

    patch.setattr(Path, "rename", rename_one)


def killed_before_the_recipe(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunFolder, "write_recipe", kill)


def killed_after_the_recipe(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rewind, "remove_own_files", kill)


def killed_before_the_state_is_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rewind, "load_start", kill)


KILLS: list[tuple[Callable[[pytest.MonkeyPatch], None], list[str]]] = [
    (killed_before_anything, ["12", "15", "18"]),
    (killed_among_the_checkpoints, ["12", "15", "18.replaced"]),
    (killed_before_the_recipe, ["12", "15.replaced", "18.replaced"]),
    (killed_after_the_recipe, ["12", "15.replaced", "18.replaced"]),
    (killed_before_the_state_is_read, ["12"]),
]


class Both:
    """Two plants at once, for the ranks of the pool."""

    def __init__(self, *plants: Callable[[pytest.MonkeyPatch], None]) -> None:
        self._plants = plants

    def __call__(self, patch: pytest.MonkeyPatch) -> None:
        for plant in self._plants:
            plant(patch)


@pytest.mark.parametrize(("plant", "left"), KILLS, ids=lambda value: getattr(value, "__name__", ""))
def test_kill_9_at_any_moment_of_it_leads_to_the_same_run(
    plant: Callable[[pytest.MonkeyPatch], None], left: list[str], runs: Runs, undisturbed: Path
) -> None:
    with pytest.raises(RankFailure, match="the process died"):
        runs.launch("killed", plant=Both(spiking, plant))
    run = runs.folder / "killed"
    there = {path.name for path in (run / "checkpoints").iterdir()} - {"3", "6", "9"}
    assert sorted(there) == left
    is_committed = plant in (killed_after_the_recipe, killed_before_the_state_is_read)
    assert ranges(run) == ([RANGE] if is_committed else [])
    runs.launch("killed", plant=spiking)
    assert_same_run(run, undisturbed)
    assert ranges(run) == [RANGE]


def disk_is_full(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(RunFolder, "write_recipe", refuse)


@pytest.mark.parametrize(
    ("plant", "setting", "reason"),
    [
        (Both(spiking), "checkpoints.checkpoint_interval=100", "there is no checkpoint from before it"),
        (Both(spiking), "guards.max_rewinds=0", "the run went back 0 times (guards.max_rewinds 0)"),
        (Both(spiking, disk_is_full), "guards.max_rewinds=1", "no space left on device"),
    ],
    ids=["no checkpoint", "too often", "full disk"],
)
def test_where_it_cannot_go_back_the_run_says_why_and_goes_on(
    plant: Both, setting: str, reason: str, runs: Runs
) -> None:
    run = runs.launch("stays", setting, plant=plant)
    (event,) = events(run, "rewind")
    assert (event["step"], event["to"], event["skipped"]) == (BAD, None, None) and event["reason"].endswith(reason)
    assert ranges(run) == []
    assert read_metrics(run / "metrics.jsonl").steps[-1].step == STEPS
    saved = {path.name for path in (run / "checkpoints").iterdir()}
    assert saved == ({str(STEPS)} if "interval" in setting else {"3", "6", "9", "12", "15", "18", "21", "24", "26"})


def test_the_checkpoint_has_read_nothing_of_what_is_skipped_where_there_is_such_a_one() -> None:
    guards = Guards(rewind_skip_before=10, rewind_skip_after=5)
    assert rewind.in_order_of_choice([10, 20, 30, 40, 50], guards, spike=45) == [30, 20, 10, 40]
    assert rewind.in_order_of_choice([35, 40], guards, spike=45) == [40, 35]
    assert rewind.in_order_of_choice([50], guards, spike=50) == []


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), max_size=4), st.integers(2, 60), st.integers(0, 30))
def test_a_new_range_holds_the_spikes_batch_and_nothing_that_the_checkpoint_has_read(
    before: list[tuple[int, int]], spike: int, back: int
) -> None:
    guards = Guards(rewind_skip_before=7, rewind_skip_after=3)
    old = [SkippedRange(first=first, end=first + length) for first, length in before]
    recipe = load_recipe("tiny").recipe.model_copy(update={"guards": guards, "data_skipped_ranges": old})
    to = max(0, spike - 1 - back)
    new = rewind.range_to_skip(recipe, spike, to)
    numbers, after = SkippedBatches.of(recipe), SkippedBatches.of(with_ranges(recipe, [new]))
    assert [after.batch_of(step) for step in range(1, to + 1)] == [numbers.batch_of(step) for step in range(1, to + 1)]
    left_out = [numbers.batch_of(step) for step in range(max(to + 1, spike - 7), spike + 1)]
    assert all(new.first <= batch < new.end for batch in left_out)
    assert (new.first, new.end) == (left_out[0], left_out[-1] + 3)


@given(st.lists(st.floats(1, 10), max_size=30), st.integers(0, 30), st.integers(1, 6))
def test_a_spike_is_one_after_a_resume_as_well(losses: list[float], cut: int, window: int) -> None:
    def found(*parts: list[float]) -> list[int]:
        spikes, step, state = [], 0, {}
        for part in parts:
            detector = SpikeDetector(window, 2.0)
            detector.restore(state)
            for loss in part:
                step += 1
                stage = "early" if step < 9 else "late"
                spikes += [step] if detector.observe(step, loss, stage) is not None else []
            state = json.loads(json.dumps(detector.state()))
        return spikes

    assert found(losses[:cut], losses[cut:]) == found(losses)
