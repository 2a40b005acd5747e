"""Slurm's own commands."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from nanotron_recipes.errors import UserError, one_line, shorten

JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?")
"""What Slurm calls a job."""
_SECONDS = 60
_SBATCH_SECONDS = 120
_DEFAULT_SLURMD_TIMEOUT = 300
_LONGEST_PRINTED = 200
_SUBMITTED = re.compile(r"(?:.*\bjob )?([0-9]+)(?:;\S+| on cluster \S+)?", flags=re.IGNORECASE)
"""`4242`, `4242;cluster` and `Submitted batch job 4242`."""
_TIMED_OUT = "timed out"
"""Part of sbatch's complaint about a controller that was asked and did not answer in time, and may have the job."""
_UNKNOWN_JOB = "Invalid job id specified"
"""Part of squeue's complaint about a job that ended a while ago."""


def require_sbatch() -> None:
    """Raise UserError where jobs cannot be submitted from this machine."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is missing, so this machine cannot submit a Slurm job: call this on the cluster's login node, "
            "or leave out --nodes (NODES=) to train on this machine"
        )


def on_all_nodes() -> list[str]:
    """What starts a command on every node of the job that this is called in, with its number and their count added.

    Raises UserError outside of a job.
    """
    nodes = os.environ.get("SLURM_NNODES")
    if nodes is None:
        raise UserError("--launcher srun: this is no Slurm job (SLURM_NNODES is not set); expected --launcher slurm")
    cpus = os.environ.get("SLURM_CPUS_ON_NODE", "1")
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"]
    return [*srun, "--kill-on-bad-exit=1", "bash", "-c", 'exec "$0" "$@" "$SLURM_PROCID" "$SLURM_NTASKS"']


class NotTaken(UserError):
    """Slurm has not taken the job, and says why."""


def submit_script(script: Path, name: str) -> str:
    """Submit the script of a job that is called `name`; the job's id.

    Raises NotTaken with what sbatch says; UserError where Slurm may have taken the job all the same, which then needs
    what lies beside its script.
    """
    try:
        done = _call("sbatch", "--parsable", str(script), timeout=_SBATCH_SECONDS)
    except OSError as error:
        raise NotTaken(f"sbatch: cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise _in_doubt(script, name, f"no answer within {_SBATCH_SECONDS} s") from None
    said = done.stderr.strip() or done.stdout.strip()
    if done.returncode < 0 or (done.returncode and _TIMED_OUT in said):
        raise _in_doubt(script, name, said or f"ended by signal {-done.returncode}")
    if done.returncode:
        raise NotTaken(f"sbatch {script}: {said or f'exit code {done.returncode}'}")
    job = submitted_job(done.stdout)
    if job is None:
        printed = shorten(one_line(done.stdout.strip() or done.stderr), _LONGEST_PRINTED)
        raise _in_doubt(script, name, f"it printed {printed!r}, which names no job" if printed else "it named no job")
    return job


def submitted_job(printed: str) -> str | None:
    """The job that sbatch names; what a cluster puts around its commands may print more lines, or have sbatch say it in
    words."""
    found = [match[1] for line in printed.splitlines() if (match := _SUBMITTED.fullmatch(line.strip()))]
    return found[-1] if found else None


def _in_doubt(script: Path, name: str, why: str) -> UserError:
    called = shlex.quote(name)
    return UserError(
        f"sbatch {script}: {why}; the job may be in the queue, so its folder is kept: look with squeue --me "
        f"--name={called}, and scancel what should not run"
    )


def job_state(job: str) -> str | None:
    """What Slurm says of a job that is queued or runs, such as PENDING; None for one that it does not know any more.

    Raises UserError with what squeue says, where it does not answer.
    """
    lines = _queue(f"--job={job}", "--format=%T")
    return lines[0] if lines else None


def jobs_called(name: str) -> list[str]:
    """The caller's jobs of that name that are queued or run. Raises UserError with what squeue says, where it does not
    answer."""
    return _queue("--me", f"--name={name}", "--format=%A")


def is_cancelled(job: str, restart: int) -> bool:
    """Whether somebody has cancelled a job, of which Slurm ends start `restart`; False where Slurm does not say.

    Slurm ends the processes of a job also at its time limit, which is then the reason, for a preemption, of which it
    tells the time, and where it puts the job back into the queue, which is a restart more.
    """
    said = dict(re.findall(r"(\w+)=(\S+)", _output("scontrol", "show", "job", "--oneliner", job)))
    is_ending = said.get("JobState") in ("COMPLETING", "CANCELLED")
    is_by_slurm = said.get("Reason") != "None" or said.get("PreemptTime", "None") != "None"
    return is_ending and not is_by_slurm and said.get("Restarts") == str(restart)


def slurmd_timeout_seconds() -> int:
    """How long a node may be silent before Slurm counts it as down."""
    found = re.search(r"^SlurmdTimeout\s*=\s*([0-9]+)", _output("scontrol", "show", "config"), flags=re.MULTILINE)
    return int(found[1]) if found else _DEFAULT_SLURMD_TIMEOUT


def requeue(job: str) -> None:
    """Put the calling job back into the queue; Slurm then ends what still runs of it, this process too.

    Raises CalledProcessError, TimeoutExpired.
    """
    subprocess.run(["scontrol", "requeue", job], check=True, timeout=_SECONDS)


def update_job(job: str, **values: str) -> None:
    """Change a queued job, for instance `StartTime` or `ExcNodeList`. Raises CalledProcessError, TimeoutExpired."""
    settings = [f"{name}={value}" for name, value in values.items()]
    subprocess.run(["scontrol", "update", f"JobId={job}", *settings], check=True, timeout=_SECONDS)


def _queue(*options: str) -> list[str]:
    """The words that squeue prints. Raises UserError."""
    # Of people who have their own view of the queue (SQUEUE_STATES …) too, all that the options ask for.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        done = _call("squeue", "--noheader", *options, environment=environment)
    except OSError as error:
        raise UserError(f"squeue: cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"squeue: no answer within {_SECONDS} s") from None
    if done.returncode and _UNKNOWN_JOB not in done.stderr:
        raise UserError(f"squeue: {done.stderr.strip() or done.stdout.strip() or f'exit code {done.returncode}'}")
    return done.stdout.split()


def _output(*command: str) -> str:
    try:
        return _call(*command).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _call(
    *command: str, timeout: float = _SECONDS, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Call one of Slurm's commands. What it prints may hold other people's text, such as a comment or a banner, in any
    encoding: a byte that is no UTF-8 is shown as such. Raises OSError, TimeoutExpired."""
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout, check=False, env=environment
    )
