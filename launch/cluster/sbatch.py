"""A run as a job script for sbatch."""

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import jinja2

from nanotron_recipes.cluster_profiles import Variable
from nanotron_recipes.errors import user_error
from nanotron_recipes.schema.services import Lighteval
from nanotron_recipes.schema.slurm import Slurm


@dataclass(frozen=True)
class Job:
    """What is submitted.

    Attributes:
        run: the run's name.
        folder: of this submission, with the recipe and the code; relative to where the job is submitted.
        logs: the run's folder for logs.
        python: of the environment that the job uses, on storage that all nodes see.
        nodes: asked for.
        resources: the recipe's `slurm` section, filled from its profile.
        environment: variables of the ranks.
        stop_after: a step to save and end after, or None.
        after: the job that has to succeed before, or None.
    """

    run: str
    folder: Path
    logs: Path
    python: str
    nodes: int
    resources: Slurm
    environment: tuple[Variable, ...] = ()
    stop_after: int | None = None
    after: str | None = None


@dataclass(frozen=True)
class EvaluationJob:
    """A job that measures one checkpoint.

    Attributes:
        run: the run's name.
        folder: the run's folder.
        logs: of its evaluations.
        code: the folder with the packages that it runs.
        python: as in `Job`.
        resources: of the run, filled from its profile.
        evaluation: the recipe's section.
    """

    run: str
    step: int
    folder: Path
    logs: Path
    code: Path
    python: str
    resources: Slurm
    evaluation: Lighteval


def render_evaluation(job: EvaluationJob) -> str:
    """The script of a job that measures a checkpoint. What `lighteval.slurm` leaves out is as in `slurm`."""
    own, around = job.evaluation.slurm, job.resources
    gpus = min(own.gpus_per_node, around.gpus_per_node)
    has_benchmarks = job.evaluation.tasks is not None and job.evaluation.tasks.tasks
    return render(
        "evaluate.sh.jinja",
        run=job.run,
        step=job.step,
        folder=job.folder,
        logs=job.logs,
        code=job.code,
        python=job.python,
        cpus_per_task=own.cpus_per_task,
        gpus=gpus,
        options={
            "partition": own.partition or around.partition,
            "qos": own.qos or around.qos,
            "time": own.time,
            "account": around.account,
            "reservation": own.reservation or around.reservation,
        },
        prologue=around.prologue,
        hf_cache=own.hf_cache,
        device="cuda" if gpus else "cpu",
        benchmarks=" --benchmarks" if has_benchmarks else "",
    )


def render_job(job: Job) -> str:
    """The script: a header of long `#SBATCH` options, and what the first node runs.

    Raises UserError for a prologue that bash cannot read.
    """
    check_prologue(job.resources.prologue)
    fewest = job.resources.min_nodes
    is_range = fewest is not None and fewest < job.nodes
    return render(
        "pretrain.sh.jinja",
        run=job.run,
        folder=job.folder,
        logs=job.logs,
        python=job.python,
        nodes_text=f"{fewest} to {job.nodes} nodes" if is_range else f"{job.nodes} node{'s' * (job.nodes > 1)}",
        nodes_option=f"{fewest}-{job.nodes}" if is_range else str(job.nodes),
        nodes=job.nodes,
        is_range=is_range,
        resources=job.resources.model_dump(),
        environment=job.environment,
        stop_after="" if job.stop_after is None else f" --stop-after {job.stop_after}",
        after=job.after,
    )


def check_prologue(text: str) -> None:
    """Raise UserError where bash cannot read the lines of slurm.prologue to their end; without bash here, never."""
    bash = shutil.which("bash")
    if bash is None or not text:
        return
    command = [bash, "--norc", "-n"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, errors="replace", env={"LC_ALL": "C"})
    said = [re.sub(r"^.*?: line ", "line ", line) for line in done.stderr.splitlines()]
    if done.returncode or any("here-document" in line for line in said):
        raise user_error(f"expected lines that bash can read ({said[0]})", key="slurm.prologue", value=text)


def render(template: str, **values: object) -> str:
    """A job script from a file of templates/. What comes from a recipe has to pass the filter `quoted`."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # shell, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["quoted"] = lambda value: shlex.quote(str(value))
    return templates.get_template(template).render(values)
