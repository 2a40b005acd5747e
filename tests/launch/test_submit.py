"""Submitting: what is written, what is called, what is refused. sbatch and squeue are small programs of the tests."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cluster import slurm
from launch.cluster.attempts import Begin, End, now, write_begin, write_end
from launch.cluster.slurm import is_cancelled, on_all_nodes
from launch.cluster.submit import Submission, job_for, submit
from launch.cluster.tokenization_job import submit_tokenization
from launch.evaluate.evaluators import SlurmEvaluator
from launch.status.gather import gather
from launch.status.runs import read_run
from launch.train.run_folder import RunFolder
from launch.train.run_header import RunHeader
from nanotron_recipes.cluster_profiles import job_resources, shipped_profiles
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe, shipped_recipes

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a file for each job that is queued or runs."""
    programs, jobs = tmp_path / "bin", tmp_path / "queue"
    for folder in (programs, jobs, tmp_path / "work"):
        folder.mkdir()
    write_program(programs / "sbatch", f'n=$(($(ls {jobs} | wc -l) + 41)); cp "$2" {jobs}/$n; echo "$n;cluster"')
    called = f'[ "$2 $3" = "--me --name=tiny-1" ] && {{ cd {jobs}; grep -l -x "#SBATCH --job-name=tiny-1" *; exit 0; }}'
    unknown = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    write_program(
        programs / "squeue", f'{called}\nj=${{2#--job=}}; if [ -f {jobs}/"$j" ]; then echo RUNNING; else {unknown}; fi'
    )
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path / "work")
    yield jobs


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


def request(
    *overrides: str,
    nodes: int = 2,
    run: str | None = None,
    gpus_per_node: int | None = None,
    after: str | None = None,
) -> Submission:
    return Submission(load_recipe("tiny", overrides), nodes, run, gpus_per_node, after=after)


def test_the_job_has_script_recipe_and_code_in_the_runs_folder(queue: Path) -> None:
    lines = list(submit(request("tokens.train_steps=7")))
    place = Path("runs/tiny-1/jobs/1")
    assert (queue / "41").read_text() == (place / "job.sh").read_text()
    assert load_recipe(str(place / "tiny.yaml")).recipe.tokens.train_steps == 7
    assert (place / "code/launch/cluster/node.py").is_file()
    assert not list(place.rglob("__pycache__"))
    assert json.loads((place / "job.json").read_text())["slurm_job"] == "41"
    assert "job 41" in lines[0]
    assert lines[-1].startswith("next:")


def test_the_snapshot_runs_without_the_clone(queue: Path, tmp_path: Path) -> None:
    list(submit(request()))
    code = Path("runs/tiny-1/jobs/1/code").resolve()
    found = subprocess.run(
        [sys.executable, "-P", "-c", "import launch.cluster.node as node; print(node.__file__)"],
        env={"PYTHONPATH": str(code)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert Path(found.strip()).is_relative_to(code)


def test_a_run_with_a_job_is_not_given_a_second_one_and_a_new_submission_is_a_new_run(queue: Path) -> None:
    list(submit(request()))
    with pytest.raises(UserError, match="job 41 of this run is queued or runs"):
        list(submit(request(run="tiny-1")))
    list(submit(request()))
    assert Path("runs/tiny-2/jobs/1").is_dir()
    (queue / "41").unlink()
    list(submit(request(run="tiny-1")))
    assert Path("runs/tiny-1/jobs/2").is_dir()


@pytest.mark.parametrize("name", ["tiny-1", None])
@pytest.mark.parametrize(
    ("squeue", "reason"),
    [
        (
            "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1",
            "squeue: slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        ),
        ("exit 3", "squeue: exit code 3"),
        (None, "squeue: cannot be started: No such file or directory"),
    ],
)
def test_a_run_that_had_a_job_is_not_given_one_while_slurm_does_not_answer(
    queue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str | None, reason: str, name: str | None
) -> None:
    list(submit(request()))
    folder = RunFolder.of(Path("runs"), "tiny-1", load_recipe("tiny").recipe)
    folder.write_recipe(dump_yaml(load_recipe("tiny").recipe), RunHeader("tiny", "", "", parent="", run="r"))
    if squeue is None:
        (tmp_path / "bin/squeue").unlink()
        monkeypatch.setenv("PATH", f"{tmp_path}/bin")
        write_program(tmp_path / "bin/sbatch", "echo 99")
    else:
        write_program(tmp_path / "bin/squeue", squeue)
    with pytest.raises(UserError) as refusal:
        list(submit(request(run=name)))
    assert str(refusal.value) == (
        f"runs/tiny-1: Slurm could not be asked whether a job of this run is queued or runs ({reason}); try again once "
        "squeue answers, or choose another --run"
    )
    assert [entry.name for entry in Path("runs").iterdir() if not entry.is_symlink()] == ["tiny-1"]
    assert [entry.name for entry in folder.jobs.iterdir()] == ["1"] and len(list(queue.iterdir())) == 1
    list(submit(request(run="another")))
    assert gather(read_run(folder.path)).state == "queued", "who only looks does not need Slurm"


def test_a_job_is_found_by_whoever_has_a_view_of_the_queue_of_their_own(
    queue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(submit(request()))
    write_program(tmp_path / "bin/squeue", '[ -n "$SQUEUE_STATES" ] || echo PENDING')
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    with pytest.raises(UserError, match="job 41 of this run is queued or runs"):
        list(submit(request(run="tiny-1")))


def test_a_run_that_gave_up_is_queued_once_it_is_submitted_again(queue: Path) -> None:
    list(submit(request()))
    run = Path("runs/tiny-1")
    (queue / "41").unlink()
    write_begin(run, Begin("41", 0, ["a", "b"], now(), 0))
    write_end(run, "41", 0, End("give up", "it would fail again", 0, now(), True, 0, []))
    folder = RunFolder.of(run.parent, run.name, load_recipe("tiny").recipe)
    folder.mark_failed("skipped_steps", 3, "the loss was not finite")
    assert gather(read_run(run)).state == "failed"
    (queue / "9").touch()  # the next job has another number
    list(submit(request(run="tiny-1")))
    status = gather(read_run(run))
    assert (status.state, status.message) == ("queued", "job 42 was submitted and has not begun")


def test_what_the_profile_says_is_in_the_recipe_that_the_nodes_read(queue: Path) -> None:
    list(submit(request("slurm.profile=cpu", "slurm.gpus_per_node=0")))
    assert load_recipe("runs/tiny-1/jobs/1/tiny.yaml").recipe.slurm.gpus_per_node == 0


def test_a_profile_that_is_moved_or_broken_later_does_not_change_the_jobs_that_evaluate_the_run(
    queue: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "ours.yaml"
    profile.write_text("slurm: {gpus_per_node: 0, partition: evening}\n")
    list(submit(request(f"slurm.profile={profile}")))
    recipe = load_recipe("runs/tiny-1/jobs/1/tiny.yaml").recipe
    evaluator = SlurmEvaluator(Path("runs/tiny-1"), tmp_path / "logs", recipe)
    (tmp_path / "logs").mkdir()
    for harm in (lambda: profile.write_text("slurm: ["), profile.unlink):
        harm()
        evaluator.command(8)
        assert "#SBATCH --partition=evening\n" in evaluator.log(8).with_suffix(".sh").read_text()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"nodes": 5}, "--nodes 5: tokens.global_batch_size: 12: expected a multiple of dp 10"),
        ({"overrides": ["parallelism.tp=3"]}, "tp"),
        ({"overrides": ["parallelism.dp=3"]}, "--nodes 2: dp × pp × tp is 3 ranks; expected a multiple of the nodes"),
        ({"overrides": ["parallelism.dp=12"]}, "at most 4"),
        ({"overrides": ["slurm.min_nodes=1"], "nodes": 5}, "--nodes 4"),
        ({"overrides": ["slurm.min_nodes=1", "parallelism.dp=2"]}, "slurm.min_nodes: 1: expected null"),
        ({"overrides": ["slurm.min_nodes=3"]}, "slurm.min_nodes: 3: expected at most --nodes 2"),
        ({"overrides": ["slurm.time=soon"]}, "slurm.time: 'soon'"),
        ({"overrides": ["slurm.profile=asw-p5"]}, "did you mean aws-p5"),
        ({"overrides": ["slurm.partition=a b"]}, "slurm.partition"),
        ({"run": "../x"}, "--run"),
        ({"after": "41 --wrap=x"}, "--after 41 --wrap=x: expected the number of a Slurm job"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    queue: Path, changes: dict[str, object], expected: str
) -> None:
    with pytest.raises(UserError) as refusal:
        list(submit(request(*changes.pop("overrides", []), **changes)))  # type: ignore[misc, arg-type]
    assert expected in str(refusal.value)
    assert not Path("runs").exists()


def test_as_many_nodes_as_are_needed_may_be_asked_for_and_no_fewer() -> None:
    assert "#SBATCH --nodes=2\n" in job_for(request("slurm.min_nodes=2"))
    with pytest.raises(UserError, match=r"^slurm\.min_nodes: 3: expected at most --nodes 2$"):
        job_for(request("slurm.min_nodes=3"))


def test_what_is_shipped_asks_for_no_number_of_nodes() -> None:
    for name in shipped_recipes():
        for profile in (None, *shipped_profiles()):
            recipe = load_recipe(name, [f"slurm.profile={profile or 'null'}"]).recipe
            assert job_resources(recipe)[0].min_nodes is None


def test_what_sbatch_says_is_passed_on(queue: Path, tmp_path: Path) -> None:
    write_program(tmp_path / "bin/sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(UserError, match="invalid partition specified: x"):
        list(submit(request()))
    assert list(Path("runs").iterdir()) == [], "nothing is left of a job that there is not"


@pytest.mark.parametrize(
    "printed",
    [
        "Welcome to cluster X\n4242",
        "4242;cluster\nSee you at http://wiki/job-42 .",
        "Submitted batch job 4242",
        "Submitted batch job 4242 on cluster one",
        "\n  4242  \n",
    ],
)
def test_a_job_is_known_by_its_id_whatever_the_cluster_prints_around_it(
    queue: Path, tmp_path: Path, printed: str
) -> None:
    write_program(tmp_path / "bin/sbatch", f"echo {shlex.quote(printed)}")
    first, *_ = submit(request())
    assert first.startswith("submitted: job 4242, run runs/tiny-1 ")
    assert json.loads(Path("runs/tiny-1/jobs/1/job.json").read_text())["slurm_job"] == "4242"
    first, *_ = submit_tokenization(load_recipe("tiny"), 1, workers=None)
    assert first == "submitted: job 4242, 1 node"


@pytest.mark.parametrize(
    ("sbatch", "reason"),
    [
        ("echo Thank you; echo Come again", "it printed 'Thank you Come again', which names no job"),
        ("echo Thank you >&2", "it printed 'Thank you', which names no job"),
        ("true", "it named no job"),
        ("exec sleep 60", "no answer within 0.5 s"),
        ("kill -9 $$", "ended by signal 9"),
        (
            "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1",
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        ),
    ],
)
def test_a_job_that_slurm_may_have_keeps_its_code_and_the_run_is_given_no_second_one(
    queue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str, reason: str
) -> None:
    monkeypatch.setattr(slurm, "_SBATCH_SECONDS", 0.5)
    write_program(tmp_path / "bin/sbatch", f'cp "$2" {queue}/77; {sbatch}')
    with pytest.raises(UserError) as doubt:
        list(submit(request()))
    assert str(doubt.value) == (
        f"sbatch runs/tiny-1/jobs/1/job.sh: {reason}; the job may be in the queue, so its folder is kept: look with "
        "squeue --me --name=tiny-1, and scancel what should not run"
    )
    place = Path("runs/tiny-1/jobs/1")
    assert (place / "code/launch/cluster/node.py").is_file() and (place / "tiny.yaml").is_file()
    assert (queue / "77").read_text() == (place / "job.sh").read_text()
    with pytest.raises(UserError, match="job 77 of this run is queued or runs"):
        list(submit(request(run="tiny-1")))
    assert gather(read_run(Path("runs/tiny-1"))).state == "stopped"
    (queue / "77").unlink()
    with pytest.raises(UserError, match="the job may be in the queue"):
        list(submit(request(run="tiny-1")))
    assert (place.parent / "2/job.sh").is_file()
    (queue / "77").unlink()
    with pytest.raises(UserError, match=re.escape(f"corpora/tiny/jobs/1/job.sh: {reason}; the job may be")):
        list(submit_tokenization(load_recipe("tiny"), 1, workers=None))
    assert Path("corpora/tiny/jobs/1/code").is_dir()


def test_what_slurm_says_may_be_in_any_encoding(queue: Path, tmp_path: Path) -> None:
    write_program(tmp_path / "bin/sbatch", r"printf 'invalid account caf\xe9\n' >&2; exit 1")
    with pytest.raises(UserError, match="invalid account caf\ufffd"):
        list(submit(request()))
    assert list(Path("runs").iterdir()) == []
    write_program(tmp_path / "bin/sbatch", r"printf 'caf\xe9 is open\n' >&2; echo 41")
    list(submit(request()))
    write_program(tmp_path / "bin/squeue", r"printf 'caf\xe9 is shut\n' >&2; exit 1")
    with pytest.raises(UserError, match=r"\(squeue: caf\ufffd is shut\)"):
        list(submit(request(run="tiny-1")))


def test_what_scontrol_says_may_be_in_any_encoding(queue: Path, tmp_path: Path) -> None:
    said = r"JobState=CANCELLED Reason=None PreemptTime=None Restarts=0 Comment=caf\xe9\n"
    write_program(tmp_path / "bin/scontrol", f"printf '{said}'")
    assert is_cancelled("41", 0)


def test_a_dry_run_needs_no_slurm_no_data_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    script = job_for(Submission(load_recipe("smollm3-3b"), 8))
    assert "#SBATCH --nodes=8\n" in script
    assert "#SBATCH --gres=gpu:8\n" in script
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stem", ["a b", ".hidden", "é", "plain"])
def test_a_dry_run_shows_the_script_that_is_submitted(queue: Path, stem: str) -> None:
    Path("p2").mkdir()
    Path(f"p2/{stem}.yaml").write_text(dump_yaml(load_recipe("tiny").recipe))
    asked = Submission(load_recipe(f"p2/{stem}.yaml"), 2)
    shown = job_for(asked)
    list(submit(asked))
    assert (queue / "41").read_text() == shown


def test_the_command_prints_the_script_alone_to_stdout(tmp_path: Path) -> None:
    words = ["pretrain", "smollm3-3b", "--nodes", "8", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from launch.cli.main import main; main()", *words],
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == job_for(Submission(load_recipe("smollm3-3b"), 8))
    assert "note: variables.SMOLLM3_DATA" in done.stderr


def test_tokenizing_is_submitted_with_a_copy_of_the_code(queue: Path) -> None:
    lines = list(submit_tokenization(load_recipe("tiny"), 4, workers=3))
    script = (queue / "41").read_text()
    assert "#SBATCH --nodes=4\n" in script
    assert "corpora/tiny/jobs/1/tiny.yaml --launcher srun --workers 3" in script
    assert "job 41, 4 nodes" in lines[0]
    assert Path("corpora/tiny/jobs/1/code/data/tokenization_worker.py").is_file()


def test_the_job_of_an_evaluation_is_told_by_its_id(tmp_path: Path) -> None:
    evaluator = SlurmEvaluator(Path("runs/tiny-1"), tmp_path, load_recipe("tiny").recipe)
    assert evaluator.told("Submitted batch job 4242") == evaluator.told("4242;one") == "submitted as job 4242"
    assert evaluator.told("Thank you") == "submitted: Thank you"


def test_srun_outside_of_a_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NNODES", raising=False)
    with pytest.raises(UserError, match="this is no Slurm job"):
        on_all_nodes()
