"""Job scripts: as they are for 1, 8 and 48 nodes, what shells say of them, and what is expanded where."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.cluster.sbatch import EvaluationJob, Job, render_evaluation, render_job
from launch.cluster.tokenization_job import script_for
from nanotron_recipes.cluster_profiles import load_profile
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.schema.services import Lighteval
from nanotron_recipes.schema.slurm import Slurm

GOLDEN = Path(__file__).parent / "golden"
AWKWARD = Slurm(
    gpus_per_node=0,
    min_nodes=2,
    cpus_per_task=4,
    partition="train",
    qos="high",
    time="1-00:00:00",
    account="lab",
    reservation="night",
    exclude="bad[1-3]",
    prologue='module load "cuda 12"',
    srun_args=["--container-mounts=/a:/b,/c:/d", "--comment='a'"],
)


def job(nodes: int, resources: Slurm, **changes: object) -> Job:
    name = f"smollm3-3b-{nodes}"
    run = Path("runs", name)
    parts = {"run": name, "folder": run / "jobs/1", "logs": run / "logs", "python": "/shared/clone/.venv/bin/python"}
    return Job(**{**parts, "nodes": nodes, "resources": resources, **changes})  # type: ignore[arg-type]


JOBS = {
    "1": job(1, Slurm(gpus_per_node=0)),
    "8": job(8, AWKWARD, stop_after=100, after="41"),
    "48": job(48, Slurm(profile="aws-p5"), environment=tuple(load_profile("aws-p5").environment)),
}


@pytest.mark.parametrize("nodes", JOBS)
def test_the_script_is_the_one_that_was_looked_at(nodes: str) -> None:
    assert render_job(JOBS[nodes]) == (GOLDEN / f"{nodes}-nodes.sh").read_text(encoding="utf-8")


def evaluation(resources: Slurm, section: dict[str, Any]) -> EvaluationJob:
    run = Path("runs/smollm3-3b-1")
    return EvaluationJob(
        run=run.name,
        step=4000,
        folder=run,
        logs=run / "logs/evaluations",
        code=Path("/shared/clone/runs/smollm3-3b-1/jobs/1/code"),
        python="/shared/clone/.venv/bin/python",
        resources=resources,
        evaluation=Lighteval.model_validate(section),
    )


EVALUATIONS = {
    "evaluation": evaluation(Slurm(), {}),
    "evaluation-cpu": evaluation(AWKWARD, {"tasks": {"tasks": "arc:easy|0"}}),
    "benchmarks": evaluation(
        Slurm(account="lab", partition="train"),
        {
            "tasks": {"tasks": "arc:challenge|0,hellaswag|0"},
            "slurm": {
                "gpus_per_node": 2,
                "cpus_per_task": 16,
                "partition": "eval",
                "qos": "low",
                "time": "01:59:00",
                "reservation": "night",
                "hf_cache": "/shared/hf cache",
            },
        },
    ),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_script_of_an_evaluation_is_the_one_that_was_looked_at(name: str, tmp_path: Path) -> None:
    text = render_evaluation(EVALUATIONS[name])
    assert text == (GOLDEN / f"{name}.sh").read_text(encoding="utf-8")
    script = tmp_path / "job.sh"
    script.write_text(text, encoding="utf-8")
    check_script(script)


def check_script(script: Path) -> None:
    """bash and shellcheck find nothing wrong; without shellcheck the test is skipped, and fails in CI."""
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("CI"), "shellcheck has to be installed where CI runs"
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "--severity=style", str(script)], check=True, timeout=60)


@pytest.mark.parametrize("nodes", JOBS)
def test_bash_and_shellcheck_find_nothing_wrong(nodes: str, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(render_job(JOBS[nodes]), encoding="utf-8")
    check_script(script)


@pytest.mark.parametrize("nodes", JOBS)
def test_no_script_destroys_anything(nodes: str) -> None:
    words = set(render_job(JOBS[nodes]).split())
    assert not words & {"rm", "rmdir", "mkfs", "mdadm", "dd", "umount", "mount", "pkill", "killall", "reboot", "sudo"}


def test_rank_and_name_of_a_node_are_expanded_on_the_node(tmp_path: Path) -> None:
    """A fake srun runs the task as two nodes would, with an environment of their own."""
    seen = run_script(
        tmp_path,
        JOBS["1"],
        srun="""
            for node in 0 1; do
                SLURM_NODEID=$node SLURMD_NODENAME=host$node "${@:8}"
            done
        """,
    )
    nodes = [line for line in seen if "launch.cluster.node" in line]
    assert ["--node-rank 0 --node-name host0" in line for line in nodes] == [True, False]
    assert "--node-rank 1 --node-name host1" in nodes[1]
    assert all("--main-address host0 --main-port" in line and "--num-nodes 2" in line for line in nodes)


def test_a_prologue_is_run_as_it_is_written_on_each_node(tmp_path: Path) -> None:
    seen = run_script(
        tmp_path,
        job(2, Slurm(gpus_per_node=0, prologue='echo "prologue of $SLURMD_NODENAME"')),
        srun='SLURM_NODEID=1 SLURMD_NODENAME=host1 "${@:8}"',
    )
    assert "prologue of host1" in seen


@pytest.mark.parametrize("options", ["set -eu", "set -e; cd /", "set +o pipefail; set -- a b c"])
def test_a_prologue_changes_nothing_about_how_the_script_goes_on(options: str, tmp_path: Path) -> None:
    """Otherwise `set -e`, which is common, ends the batch shell with srun, and nothing puts the job back."""
    of = job(2, Slurm(gpus_per_node=0, prologue=f"export FOUND='it is'\n{options}"))
    seen = run_script(tmp_path, of, srun='"${@:8}"; echo "$FOUND there"; exit 1')
    node = next(line for line in seen if "launch.cluster.node" in line)
    assert "launch.cluster.node runs/smollm3-3b-2/jobs/1" in node and "--main-address host0 --main-port" in node
    assert "it is there" in seen and "launch.cluster.job end" in seen[-1] and "--srun-code 1" in seen[-1]


def test_what_a_prologue_sources_finds_no_arguments_on_a_node(tmp_path: Path) -> None:
    """`source activate` takes them for the name of an environment."""
    of = job(2, Slurm(gpus_per_node=0, prologue='[ -z "$SLURMD_NODENAME" ] || echo "found $# arguments"'))
    assert "found 0 arguments" in run_script(tmp_path, of, srun='SLURMD_NODENAME=host1 "${@:8}"')


@pytest.mark.parametrize("end", ["exit 0", "set -e; false", "[ -e /nowhere ] || exit 0"])
@pytest.mark.parametrize("where", ["batch", "node"])
def test_a_prologue_that_ends_its_shell_is_a_failure(end: str, where: str, tmp_path: Path) -> None:
    """With exit code 0 a job that waits for this one would begin."""
    only = f'[ -n "$SLURMD_NODENAME" ] && {{ {end}; }}; :' if where == "node" else end
    of = job(2, Slurm(gpus_per_node=0, prologue=only))
    seen = run_script(tmp_path, of, srun='SLURMD_NODENAME=host1 "${@:8}"', code=0 if where == "node" else 1)
    assert not any("launch.cluster.node" in line for line in seen)
    assert where == "batch" or "--srun-code 1" in seen[-1]


@pytest.mark.parametrize(
    "text", ["if true; then", "echo 'unbalanced", "}", "cat <<EOF", "export A=1\nEND_OF_NODE_SCRIPT\ncat <<X"]
)
def test_a_prologue_that_is_no_shell_text_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^slurm\.prologue: .*: expected lines that bash can read \(line \d+: .+\)$"):
        render_job(job(2, Slurm(prologue=text)))


def test_no_line_of_a_prologue_ends_a_part_of_the_script(tmp_path: Path) -> None:
    of = job(2, Slurm(gpus_per_node=0, prologue='END_OF_NODE_SCRIPT() { echo "it\'s $1"; }\nEND_OF_NODE_SCRIPT called'))
    seen = run_script(tmp_path, of, srun='"${@:8}"')
    assert seen.count("it's called") == 2 and "launch.cluster.job end" in seen[-1]


@pytest.mark.parametrize("corpus", ["corpora/mine", "{here}/my corpus"])
@pytest.mark.parametrize("name", ["mine", "it's mine", "mine\n#SBATCH --nodes=9"])
def test_a_tokenization_runs_the_code_that_was_submitted_wherever_the_corpus_is(
    corpus: str, name: str, small_file: Path, tmp_path: Path
) -> None:
    file, folder = tmp_path / f"{name}.yaml", Path(corpus.format(here=tmp_path))
    shutil.copy(small_file, file)
    text = script_for(load_recipe(str(file), [f"corpus.path={folder}", "slurm.prologue=cd /"]), 2, None)
    header = text.partition("set -o pipefail")[0].splitlines()
    assert [line for line in header if line.startswith("#SBATCH --nodes")] == ["#SBATCH --nodes=2"]
    script = tmp_path / "job.sh"
    script.write_text(text.replace("exec ", 'echo "$PYTHONPATH"; exit; exec '), encoding="utf-8")
    done = subprocess.run(["bash", str(script)], env={}, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / folder / 'jobs/1/code'}\n"


def test_arguments_of_srun_reach_it_as_they_were_written(tmp_path: Path) -> None:
    odd = "--comment='$(date)';`date`"
    seen = run_script(tmp_path, job(2, Slurm(gpus_per_node=0, srun_args=[odd])), srun='printf "%s\\n" "$@"')
    assert odd in seen


def test_a_signal_to_the_batch_shell_reaches_srun_and_the_end_is_told(tmp_path: Path) -> None:
    seen = run_script(
        tmp_path,
        JOBS["1"],
        srun="""
            trap 'echo srun got USR1; exit 0' USR1
            kill -s USR1 $PPID
            for _ in $(seq 100); do sleep 0.1; done
        """,
    )
    assert "srun got USR1" in seen
    assert any("launch.cluster.job end" in line and "--asked USR1" in line for line in seen)


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_that_comes_late_does_not_end_what_puts_the_job_back(name: str, tmp_path: Path) -> None:
    """The batch shell has become `job end` by then."""
    seen = run_script(tmp_path, JOBS["1"], srun="true", end=f"kill -s {name} $$; sleep 0.1; echo it went on")
    assert seen[-1] == "it went on"


def test_a_signal_during_the_prologue_is_not_lost_and_ends_nothing(tmp_path: Path) -> None:
    slow = job(2, Slurm(gpus_per_node=0, prologue='[ -n "$SLURMD_NODENAME" ] || kill -s USR1 $$'))
    seen = run_script(tmp_path, slow, srun="trap 'exit 0' USR1; for _ in $(seq 50); do sleep 0.1; done")
    assert any("launch.cluster.job end" in line and "--asked USR1" in line for line in seen)


def test_what_begin_says_decides_whether_anything_is_started(tmp_path: Path) -> None:
    seen = run_script(tmp_path, JOBS["1"], srun="echo srun was called", begin_code=3)
    assert "srun was called" not in seen
    assert not any("launch.cluster.job end" in line for line in seen)


def run_script(folder: Path, of: Job, *, srun: str, begin_code: int = 0, end: str = "", code: int = 0) -> list[str]:
    """What a script prints whose commands are fakes: python says what it is called with; what `srun` and, at the end of
    a job, python do is given; `code` is what the script ends with."""
    programs = folder / "bin"
    programs.mkdir()
    told = f'echo "$*"; case "$*" in *" begin "*) exit {begin_code};; *" end "*) {end or ":"};; esac'
    write_program(programs / "python", told)
    write_program(programs / "scontrol", "printf 'host0\\nhost1\\n'")
    write_program(programs / "srun", srun)
    script = folder / "job.sh"
    script.write_text(render_job(Job(**{**vars(of), "python": str(programs / "python")})), encoding="utf-8")
    batch_shell = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "host[0-1]", "SLURM_NNODES": "2", "SLURM_NODEID": "0"}
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_CPUS_ON_NODE": "4", **batch_shell}
    done = subprocess.run(
        ["bash", str(script)], env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout.splitlines()


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
