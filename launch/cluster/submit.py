"""From a recipe to a job in Slurm's queue."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launch.cluster.sbatch import Job, render_job
from launch.cluster.slurm import JOB_ID, NotTaken, job_state, jobs_called, require_sbatch, submit_script
from launch.cluster.snapshot import take_snapshot
from launch.train.prepare import RUNS, check_trainable, fits_unfinished_run
from launch.train.run_choice import choose_run, first_name, point_latest
from launch.train.run_folder import RunFolder, checked_name
from nanotron_recipes.cluster_profiles import Variable, job_resources
from nanotron_recipes.errors import UserError, user_error
from nanotron_recipes.files import write_atomic
from nanotron_recipes.loading import LoadedRecipe, dump_yaml
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.slurm import Slurm
from nanotron_recipes.topology import local_world_size, resolve_topology

SUBMISSION_FILE = "job.json"


@dataclass(frozen=True)
class Submission:
    """What a user asked for: see `nanotron-recipes pretrain --help`."""

    loaded: LoadedRecipe
    nodes: int
    run: str | None = None
    gpus_per_node: int | None = None
    stop_after: int | None = None
    after: str | None = None


@dataclass(frozen=True)
class SubmittedJob:
    """What a submission's folder says about its job; `slurm_job` is empty until Slurm has said that it has it."""

    slurm_job: str
    nodes: int
    stop_after: int | None

    @classmethod
    def read(cls, folder: Path) -> "SubmittedJob | None":
        """The job of a submission; None where its file is missing or damaged."""
        try:
            content = json.loads((folder / SUBMISSION_FILE).read_text(encoding="utf-8"))
            return cls(str(content["slurm_job"]), int(content["nodes"]), content["stop_after"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write(self, folder: Path) -> None:
        """Write it beside the job's script."""
        write_atomic(folder / SUBMISSION_FILE, json.dumps(asdict(self)) + "\n")


def job_for(request: Submission) -> str:
    """The script of the recipe's first run, or of the one asked for, from the recipe alone: no data is looked at and
    nothing is written. Raises UserError."""
    loaded, resources, environment = _planned(request)
    name = request.run or first_name(loaded.name)
    folder = RunFolder.of(RUNS, name, loaded.recipe)
    return render_job(_job(request, folder, folder.jobs / "1", resources, environment))


def submit(request: Submission) -> Iterator[str]:
    """Submit the run as a job; yields what a person should know, the job's id and how to follow it last.

    Raises UserError where the recipe cannot be trained on so many nodes, where a job of the run is queued or running
    or Slurm does not say, and where it does not take the job.
    """
    require_sbatch()
    loaded, resources, environment = _planned(request)
    check_trainable(loaded.recipe, loaded.path.name)
    folder, is_new = _run_folder(request, loaded)
    folder.logs.mkdir(exist_ok=True)
    place = take_snapshot(folder.path, loaded.name, dump_yaml(loaded.recipe))
    script = place / "job.sh"
    write_atomic(script, render_job(_job(request, folder, place, resources, environment)))
    job = SubmittedJob("", request.nodes, request.stop_after)
    job.write(place)
    try:
        job = replace(job, slurm_job=submit_script(script, folder.name))
    except NotTaken:
        shutil.rmtree(place)  # made above, for a job that there is not
        for made in (folder.jobs, folder.logs, folder.path) if is_new else ():
            made.rmdir()
        raise
    job.write(place)
    point_latest(RUNS, folder)
    folder.forget_failure()
    log = folder.logs / f"slurm-{job.slurm_job}.log"
    yield f"submitted: job {job.slurm_job}, run {folder.path} on {request.nodes} node{'s' * (request.nodes > 1)}"
    yield f"script:    {script} (with the recipe and the code that it runs beside it)"
    yield f"log:       tail -F {log}"
    yield f"stop:      scancel --signal=USR1 --batch {job.slurm_job} (saves and is queued again)"
    yield f"next:      squeue --job {job.slurm_job}"


def _planned(request: Submission) -> tuple[LoadedRecipe, Slurm, list[Variable]]:
    """The recipe with its `slurm` section as it holds for this job; checked for every number of nodes it may get."""
    if request.after is not None and not JOB_ID.fullmatch(request.after):
        raise UserError(f"--after {request.after}: expected the number of a Slurm job")
    loaded = request.loaded
    resources, environment = job_resources(loaded.recipe)
    if request.gpus_per_node is not None:
        resources = resources.model_copy(update={"gpus_per_node": request.gpus_per_node})
    recipe = loaded.recipe.model_copy(update={"slurm": resources})
    fewest = resources.min_nodes or request.nodes
    if fewest > request.nodes:
        raise user_error(f"expected at most --nodes {request.nodes}", key="slurm.min_nodes", value=fewest)
    if fewest < request.nodes and recipe.parallelism.dp != "auto":
        raise user_error(
            f"expected null where parallelism.dp is a number ({recipe.parallelism.dp})",
            key="slurm.min_nodes",
            value=fewest,
        )
    for nodes in range(fewest, request.nodes + 1):
        ranks_on_each_node(recipe, nodes)
    return replace(loaded, recipe=recipe), resources, environment


def ranks_on_each_node(recipe: Recipe, nodes: int) -> int:
    """How many ranks each of `nodes` nodes starts. Raises UserError where the recipe cannot be trained on them."""
    per_node = recipe.slurm.gpus_per_node or None
    ranks = local_world_size(recipe, per_node, nodes)
    offered = nodes * (per_node or recipe.general.cpu_ranks_per_node)
    if ranks % nodes or ranks > offered:
        raise UserError(
            f"--nodes {nodes}: dp × pp × tp is {ranks} ranks; expected a multiple of the nodes, and at most {offered} "
            f"({offered // nodes} on each: slurm.gpus_per_node, or general.cpu_ranks_per_node without GPUs)"
        )
    try:
        resolve_topology(recipe, ranks)
    except UserError as error:
        raise UserError(f"--nodes {nodes}: {error}") from None
    return ranks // nodes


def _run_folder(request: Submission, loaded: LoadedRecipe) -> tuple[RunFolder, bool]:
    """The run's folder, and whether it was made here. A job of the run that is queued or runs is given no company."""
    if request.run is not None:
        checked_name(request.run)
    choice = choose_run(RUNS, loaded.name, loaded.recipe, request.run, lambda folder: _may_go_on(folder, loaded.recipe))
    folder = choice.folder
    if choice.state == "complete":
        raise UserError(f"{folder.path} is complete; expected another --run, or more tokens.train_steps")
    busy = _busy_job(folder)
    if busy is not None:
        raise UserError(
            f"{folder.path}: job {busy} of this run is queued or runs; wait for it, scancel {busy}, or choose another "
            "--run"
        )
    is_new = not folder.path.is_dir()
    if is_new:
        folder.create()
    return folder, is_new


def _may_go_on(folder: RunFolder, recipe: Recipe) -> bool:
    """Whether an unfinished run that nobody named fits. What data it reads is looked at on the nodes."""
    return _busy_job(folder) is None and fits_unfinished_run(folder, recipe, None)


def _busy_job(folder: RunFolder) -> str | None:
    """A job of the run that is queued or runs. Raises UserError where Slurm does not say."""
    found = [SubmittedJob.read(file.parent) for file in folder.jobs.glob(f"*/{SUBMISSION_FILE}")]
    jobs = [job.slurm_job for job in found if job is not None]
    try:
        if "" in jobs:  # of which sbatch did not say whether Slurm has it
            jobs += jobs_called(folder.name)
        return next((job for job in jobs if job and job_state(job) is not None), None)
    except UserError as error:
        raise UserError(
            f"{folder.path}: Slurm could not be asked whether a job of this run is queued or runs ({error}); try again "
            "once squeue answers, or choose another --run"
        ) from None


def _job(request: Submission, folder: RunFolder, place: Path, resources: Slurm, environment: list[Variable]) -> Job:
    return Job(
        run=folder.name,
        folder=place,
        logs=folder.logs,
        python=sys.executable,
        nodes=request.nodes,
        resources=resources,
        environment=tuple(environment),
        stop_after=request.stop_after,
        after=request.after,
    )
