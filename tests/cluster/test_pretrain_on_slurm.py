"""`nanotron-recipes pretrain --nodes 2` on a real Slurm: to the end, whatever ends it in between."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoint_store import checkpoint_store, uploading
from processes import running
from s3_server import set_credentials
from slurm_cluster import SlurmCluster
from slurm_conf import SETTINGS
from small_pretraining import curve, pretrain_command, small_recipe, write_recipe, write_text

from data.tokenization import tokenize
from launch.cluster.attempts import Attempt, read_attempts
from launch.train.metrics import read_metrics
from nanotron_recipes.loading import load_recipe

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).parents[2]
TRAIN_STEPS = 160
INTERVAL = 8
STEP_SECONDS = 0.25
SLOW = "slow"
"""While a file of this name is on the shared storage, a step takes so long."""
Curve = dict[int, tuple[float | None, float | None, float]]


@pytest.fixture(scope="session")
def shared(running_cluster: SlurmCluster) -> Path:
    """A recipe that trains for a moment on nodes without GPUs, its tokenized text, and a clone, all on storage
    that all nodes see."""
    folder = running_cluster.work
    write_text(folder)
    recipe = small_recipe(folder)
    recipe["general"]["cpu_ranks_per_node"] = 1
    recipe["slurm"] = {"gpus_per_node": 0, "prologue": "set -eu; cd /"}  # as they are found, and to no effect
    recipe["tokens"] |= {"train_steps": TRAIN_STEPS, "val_check_interval": 100}
    recipe["optimizer"]["learning_rate_scheduler"] |= {"lr_decay_starting_step": 150}
    recipe["checkpoints"] |= {"checkpoint_interval": INTERVAL, "keep_last": 3}
    tokenize(load_recipe(str(write_recipe(folder / "small.yaml", recipe))).recipe, "small")
    for package in ("nanotron_recipes", "parallel", "model", "data", "launch"):
        shutil.copytree(REPOSITORY / package, folder / "clone" / package, ignore=shutil.ignore_patterns("__pycache__"))
    slow_down(folder / "clone" / "launch" / "train" / "engine.py", folder / SLOW)
    return folder


def slow_down(engine: Path, slow: Path) -> None:
    """Make a step take a moment while `slow` is there, so that a run lasts until something is done to it, however fast
    the machine is, and is soon over afterwards."""
    text, line = engine.read_text(), "        self.gradients.begin(count)\n"
    assert line in text
    pause = f"__import__('time').sleep({STEP_SECONDS} * __import__('os').path.exists({str(slow)!r}))"
    engine.write_text(text.replace(line, f"{line}        {pause}\n"))


@pytest.fixture(scope="session")
def undisturbed(shared: Path) -> Curve:
    """The same run on this machine alone, with as many ranks."""
    arguments = ["small.yaml", "--run", "local", "--set", "general.cpu_ranks_per_node=2"]
    call(shared, pretrain_command(*arguments), seconds=300)
    return losses(shared, "local")


def call(folder: Path, command: list[str | Path], seconds: float = 120, **variables: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "PYTHON", "SLURM"))}
    environment = {**kept, "PYTHONPATH": str(folder / "clone"), **variables}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(folder: Path, run: str) -> Curve:
    return curve(read_metrics(folder / "runs" / run / "metrics.jsonl").steps)


def assert_same_training(found: Curve, undisturbed: Curve) -> None:
    """Every step once, with its learning rate and its loss, beyond what another number of ranks rounds otherwise."""
    assert found.keys() == undisturbed.keys()
    for step, (loss, _, rate) in undisturbed.items():
        assert found[step][0] == pytest.approx(loss, abs=1e-5) and found[step][2] == rate, step


@dataclass
class Submitted:
    """A run that was submitted."""

    cluster: SlurmCluster
    folder: Path
    run: str
    job: int

    @property
    def path(self) -> Path:
        return self.folder / "runs" / self.run

    def wait_for_step(self, step: int, seconds: float = 300) -> None:
        """Return once a step of this start of the job is recorded."""
        self.wait(lambda: self.last_step() >= step, f"step {step}", seconds)

    def last_step(self) -> int:
        file = self.path / "metrics.jsonl"
        return max((record.step for record in read_metrics(file).steps), default=0) if file.is_file() else 0

    def wait(self, reached: Callable[[], Any], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, f"no {what} in {seconds:g} s: {self.log()[-3000:]}"
            time.sleep(0.05)

    def hurry(self) -> None:
        """What was to be done to the run is done: it need not last any longer."""
        (self.folder / SLOW).unlink(missing_ok=True)

    def finish(self, seconds: float = 600) -> None:
        self.hurry()
        try:
            self.cluster.wait(self.job, "COMPLETED", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n--- log ---\n{self.log()[-6000:]}") from None

    def log(self) -> str:
        return "".join(file.read_text(errors="replace") for file in sorted(self.path.glob("logs/slurm-*.log")))

    def attempts(self) -> list[Attempt]:
        return read_attempts(self.path)

    def nodes_of_start(self, number: int) -> list[str]:
        return self.attempts()[number].begin.nodes


Submit = Callable[..., Submitted]


@pytest.fixture
def submit(cluster: SlurmCluster, shared: Path) -> Submit:
    def do(run: str, *arguments: str) -> Submitted:
        command = pretrain_command("small.yaml", "--run", run, "--nodes", "2", *arguments)
        # With one thread, as the run that it is compared with: with more, bits depend on how busy the machine is.
        (shared / SLOW).touch()
        said = call(shared, command, SLURM_CONF=cluster.environment["SLURM_CONF"], OMP_NUM_THREADS="1")
        job = int(said.split("submitted: job ")[1].split(",")[0])
        return Submitted(cluster, shared, run, job)

    return do


def test_a_run_on_two_nodes_has_the_losses_of_one_machine_and_the_code_of_its_submission(
    submit: Submit, shared: Path, undisturbed: Curve
) -> None:
    blocker = shared / "clone" / "launch" / "cluster" / "node.py"
    text = blocker.read_text()
    submitted = submit("plain")
    try:
        blocker.write_text("raise SystemExit('the clone was edited after the job was submitted')\n")
        submitted.finish()
    finally:
        blocker.write_text(text)
    assert losses(shared, "plain") == undisturbed
    assert [attempt.begin.nodes for attempt in submitted.attempts()] == [["node1", "node2"]]
    assert (submitted.path / "completed").is_file()


def test_time_limits_save_requeue_and_change_no_bit(submit: Submit, shared: Path, undisturbed: Curve) -> None:
    """A minute is less than the run needs with the start of its processes, and Slurm sends its signals early."""
    submitted = submit("limited", "--set", "slurm.time='1'", "--set", "slurm.signal_seconds=25")
    for _ in range(12):
        submitted.cluster.wait(submitted.job, lambda job: job["JobState"] != "PENDING", 60)
        job = submitted.cluster.wait(submitted.job, lambda job: job["JobState"] in ("COMPLETED", "PENDING"), 300)
        if job["JobState"] == "COMPLETED":
            break
        submitted.hurry()
        submitted.cluster.release(submitted.job)
    submitted.finish()
    assert losses(shared, "limited") == undisturbed
    ends = [attempt.end for attempt in submitted.attempts()]
    assert len(ends) > 1 and ends[0] is not None and "asked to stop (USR1)" in ends[0].reason


def test_a_run_that_is_asked_saves_requeues_and_changes_no_bit(
    submit: Submit, shared: Path, undisturbed: Curve
) -> None:
    submitted = submit("asked")
    submitted.wait_for_step(20)
    submitted.cluster.run("scancel", "--signal=USR1", "--batch", str(submitted.job))
    submitted.cluster.release(submitted.job)
    submitted.finish()
    assert losses(shared, "asked") == undisturbed
    first, second = submitted.attempts()
    assert first.end is not None and not first.end.is_failure and first.end.step >= 20
    assert second.begin.step == first.end.step
    assert second.end is not None and second.end.verdict == "done"


@pytest.fixture
def patient(cluster: SlurmCluster) -> Iterator[None]:
    """Jobs have as long to end as Slurm gives them by default."""
    cluster.reconfigure("KillWait", "30")
    yield
    cluster.reconfigure("KillWait", SETTINGS["KillWait"])


def test_a_run_that_is_cancelled_saves_is_not_queued_again_and_goes_on_when_it_is_submitted_again(
    submit: Submit, shared: Path, undisturbed: Curve, patient: None
) -> None:
    submitted = submit("cancelled")
    submitted.wait_for_step(20)
    submitted.cluster.run("scancel", str(submitted.job))
    assert submitted.cluster.wait(submitted.job, "CANCELLED", 60)["Restarts"] == "0"
    (attempt,) = submitted.attempts()
    assert attempt.end is not None and attempt.end.verdict == "cancelled" and attempt.end.step >= 20
    again = submit("cancelled")
    again.finish()
    assert losses(shared, "cancelled") == undisturbed
    assert again.attempts()[1].begin.step == attempt.end.step


def test_a_preempted_run_saves_and_goes_on_when_its_nodes_are_free_again(
    submit: Submit, cluster: SlurmCluster, shared: Path, undisturbed: Curve
) -> None:
    submitted = submit("preempted")
    submitted.wait_for_step(20)
    urgent = cluster.submit("--partition=urgent", "--nodes=3", "--exclusive", "--wrap=sleep 5")
    cluster.wait(urgent, "COMPLETED", 300)
    reached = submitted.last_step()
    cluster.release(submitted.job)
    submitted.finish()
    assert losses(shared, "preempted") == undisturbed
    first, second = submitted.attempts()
    assert first.end is None or not first.end.is_failure
    assert second.begin.step == reached >= 20, "not the last one that was due"


def test_a_rank_that_is_killed_costs_a_requeue_and_no_bit(submit: Submit, shared: Path, undisturbed: Curve) -> None:
    submitted = submit("killed")
    submitted.wait_for_step(30)
    ranks = running(submitted.cluster.processes("node2"), "launch.train")
    assert len(ranks) == 1
    ranks[0].send_signal(signal.SIGKILL)
    submitted.cluster.release(submitted.job)
    submitted.finish()
    assert losses(shared, "killed") == undisturbed
    first = submitted.attempts()[0]
    assert first.end is not None and first.end.is_failure and first.end.pause_seconds == 60
    assert first.end.reason.startswith("node2: ") and "SIGKILL" in first.end.reason


def test_what_would_fail_again_is_not_started_again(submit: Submit, shared: Path) -> None:
    """A mistake that only the nodes can see: the shards are gone when the job begins."""
    submitted = submit("mistaken", "--set", "data_stages.0.data.dataset.dataset_folder=[/nowhere/words,numbers]")
    submitted.cluster.wait(submitted.job, "FAILED", 300)
    (attempt,) = submitted.attempts()
    assert attempt.end is not None and attempt.end.verdict == "give up"
    assert "/nowhere/words" in attempt.end.reason


@pytest.mark.parametrize("how", ["power_off", "cut_off"])
def test_a_lost_node_costs_at_most_a_save_interval_with_checkpoints_on_the_nodes_disks(
    submit: Submit, cluster: SlurmCluster, shared: Path, undisturbed: Curve, how: str
) -> None:
    """Two nodes train from their own disks. A third, which has neither shards nor checkpoints, takes the place of the
    lost one."""
    run = f"lost-{how}"
    own_disks = [f"checkpoints.checkpoints_path={cluster.scratch}/ckpt", "checkpoints.copies=2"]
    own_disks += [f"data_staging.path={cluster.scratch}/shards-{how}"]
    submitted = submit(run, *(word for change in own_disks for word in ("--set", change)))
    submitted.wait_for_step(40)
    lost = submitted.nodes_of_start(0)[1]
    reached = submitted.last_step()
    getattr(submitted.cluster, how)(lost)
    submitted.cluster.release(submitted.job, seconds=300)
    submitted.finish()
    second = submitted.attempts()[1]
    assert lost not in second.begin.nodes and len(second.begin.nodes) == 2
    assert "files came from other nodes of the job" in submitted.log()
    starts = [event for event in read_metrics(submitted.path / "metrics.jsonl").events if event["event"] == "start"]
    assert starts[-1]["step"] > reached - INTERVAL
    found = losses(shared, run)
    assert_same_training(found, undisturbed)
    if how == "cut_off":
        finished = json.dumps(sorted(found.items()))
        submitted.cluster.reconnect(lost)
        time.sleep(5)
        assert json.dumps(sorted(losses(shared, run).items())) == finished


def test_with_no_node_to_take_the_place_of_a_lost_one_the_rest_train_on(
    submit: Submit, cluster: SlurmCluster, shared: Path, undisturbed: Curve
) -> None:
    """Two nodes where the third is out of use; of the two one is lost, and the other has copies of its checkpoints."""
    cluster.power_off("node3")
    changes = ["slurm.min_nodes=1", f"checkpoints.checkpoints_path={cluster.scratch}/ckpt", "checkpoints.copies=2"]
    submitted = submit("fewer", *(word for change in changes for word in ("--set", change)))
    submitted.wait_for_step(40)
    kept, lost = submitted.nodes_of_start(0)
    reached = submitted.last_step()
    cluster.power_off(lost)
    cluster.release(submitted.job, seconds=300)
    submitted.finish()
    assert [attempt.begin.nodes for attempt in submitted.attempts()] == [[kept, lost], [kept]]
    starts = [event for event in read_metrics(submitted.path / "metrics.jsonl").events if event["event"] == "start"]
    assert starts[-1]["step"] > reached - INTERVAL
    assert_same_training(losses(shared, "fewer"), undisturbed)


def test_a_lost_node_whose_parts_only_the_store_has_is_replaced(
    submit: Submit, cluster: SlurmCluster, shared: Path, undisturbed: Curve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part of a checkpoint is on one node's disk, and in S3."""
    set_credentials(monkeypatch)
    disks = [f"checkpoints.checkpoints_path={cluster.scratch}/ckpt", f"data_staging.path={cluster.scratch}/shards-s3"]
    with checkpoint_store(cluster.own_address) as store:
        submitted = submit("stored", *(word for change in disks for word in ("--set", change)), *uploading(store))
        submitted.wait_for_step(40)
        submitted.wait(lambda: max(store.whole_steps("stored", shared), default=0) >= 32, "upload", 120)
        lost = submitted.nodes_of_start(0)[1]
        uploaded, reached = store.whole_steps("stored", shared)[-1], submitted.last_step()
        submitted.cluster.power_off(lost)
        submitted.cluster.release(submitted.job, seconds=300)
        submitted.finish()
        second = submitted.attempts()[1]
        assert lost not in second.begin.nodes and len(second.begin.nodes) == 2
        starts = [event for event in read_metrics(submitted.path / "metrics.jsonl").events if event["event"] == "start"]
        assert uploaded < starts[-1]["step"] <= reached + 1
        assert "fetched from the store, and verified" in submitted.log()
        assert store.whole_steps("stored", shared)[-1] == TRAIN_STEPS
    assert_same_training(losses(shared, "stored"), undisturbed)


def test_hosts_without_slurm_train_one_run(cluster: SlurmCluster, shared: Path, undisturbed: Curve) -> None:
    """torchrun called on each of two hosts, as docs/cluster.md has it."""
    hosts = []
    for number, name in enumerate(cluster.names[:2]):
        into = ["nsenter", f"--target={cluster.processes(name)[0].pid}", "--net", "--mount", "--uts", f"--wd={shared}"]
        torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={number}"]
        torchrun += ["--nproc-per-node=1", f"--master-addr={cluster.names[0]}", "--master-port=29500"]
        run = ["-m", "launch.train", "--", "small.yaml", "--run", "by-hand"]
        environment = {**cluster.environment, "PYTHONPATH": str(shared / "clone"), "OMP_NUM_THREADS": "1"}
        hosts.append(subprocess.Popen([*into, *torchrun, *run], env=environment, stdout=subprocess.DEVNULL))
    try:
        assert [host.wait(600) for host in hosts] == [0, 0]
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    assert losses(shared, "by-hand") == undisturbed
