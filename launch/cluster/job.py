"""What a job's batch shell asks of Python: `python -m launch.cluster.job begin|end FOLDER …`, FOLDER a submission's."""

import argparse
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from launch.cluster.attempts import (
    Attempt,
    Begin,
    End,
    cancelled,
    decide,
    now,
    read_attempts,
    write_begin,
    write_end,
)
from launch.cluster.slurm import is_cancelled, requeue, slurmd_timeout_seconds, update_job
from launch.cluster.snapshot import job_recipe
from launch.cluster.termination import Termination
from launch.train.arguments import Parser, step_number
from launch.train.holder import GONE_AFTER_SECONDS
from launch.train.metrics import kept_checkpoints, read_metrics
from launch.train.run_folder import RunFolder
from launch.train.run_lock import holder_of, is_earlier_start, job_launch_id
from launch.train.streams import describe, say
from launch.train.webhook import Webhook
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import LoadedRecipe, load_recipe

NOTHING_LEFT = 3
_LOOK_AGAIN_SECONDS = 5.0
_SLURM_S_OWN_HOLD_SECONDS = 120
"""Slurm keeps every requeued job back for so long."""


def main(words: Sequence[str]) -> int:
    """Returns the exit code: 0; of `begin` also NOTHING_LEFT; 2 for a user's mistake; 1 for a job that has failed."""
    try:
        arguments = _parse(words)
        loaded = load_recipe(str(job_recipe(arguments.folder)))
        path = arguments.folder.parent.parent
        folder = RunFolder.of(path.parent, path.name, loaded.recipe)
        if arguments.moment == "begin":
            return _begin(folder, loaded, arguments)
        with Termination() as termination:
            return _end(folder, loaded, arguments, termination)
    except (UserError, OSError) as error:
        say(f"error: {describe(error)}", error=True)
        return 2


def _parse(words: Sequence[str]) -> Namespace:
    parser = Parser(prog="launch.cluster.job", description="Begin or end one start of a Slurm job.")
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("folder", type=Path, help="of the submission: runs/<name>/jobs/<number>")
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--restart", type=int, required=True)
    parser.add_argument("--nodes", default="", help="begin: names of the nodes")
    parser.add_argument("--srun-code", type=int, default=0, help="end: srun's exit code")
    parser.add_argument("--asked", default="", help="end: the signal that the batch shell has got")
    parser.add_argument("--stop-after", type=step_number, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def saved_step(folder: RunFolder) -> int:
    """The newest step whose checkpoint was written whole, as the run's records say: checkpoints may lie on disks that
    are not seen from here."""
    if not folder.metrics_file.is_file():
        return 0
    return max(kept_checkpoints(read_metrics(folder.metrics_file).events), default=0)


def _begin(folder: RunFolder, loaded: LoadedRecipe, arguments: Namespace) -> int:
    from rich.console import Console

    from launch.cli.prepare_data import ensure_tokens

    _say(arguments, f"start on {arguments.nodes}")
    if _is_done(folder, loaded, arguments.stop_after):
        _say(arguments, f"{folder.path}: nothing is left to train")
        return NOTHING_LEFT
    _wait_for_holder(folder.path, arguments)
    begin = Begin(arguments.job_id, arguments.restart, arguments.nodes.split(","), now(), saved_step(folder))
    write_begin(folder.path, begin)
    folder.forget_failure()
    try:
        is_ready = ensure_tokens(loaded, Console(soft_wrap=True))
    except (UserError, OSError) as error:
        _give_up(folder, loaded, arguments, begin.step, describe(error))
        raise
    if not is_ready:
        _give_up(folder, loaded, arguments, begin.step, "the text could not be tokenized (see the job's log)")
    return 0 if is_ready else 1


def _give_up(folder: RunFolder, loaded: LoadedRecipe, arguments: Namespace, step: int, reason: str) -> None:
    """Note that this start, and with it the job, ends before there were ranks."""
    end = End("give up", reason, step, now(), is_failure=True, pause_seconds=0, keep_off=[])
    write_end(folder.path, arguments.job_id, arguments.restart, end)
    _tell_somebody(folder, loaded, end)


def _tell_somebody(folder: RunFolder, loaded: LoadedRecipe, end: End) -> None:
    with Webhook.of(loaded.recipe, folder.name) as webhook:
        webhook.send("gave_up", end.step, end.reason)


def _wait_for_holder(path: Path, arguments: Namespace) -> None:
    """Wait until another job's processes, which may have been lost with their node, count as gone. What still trains
    keeps the run: the ranks say so."""
    launch_id = job_launch_id(arguments.job_id, arguments.restart)
    deadline = time.monotonic() + GONE_AFTER_SECONDS + 60
    said = False
    while time.monotonic() < deadline:
        holder = holder_of(path)
        if holder is None or is_earlier_start(holder.launch_id, launch_id):
            return
        if not said:
            _say(arguments, f"process {holder.pid} on {holder.host} has the run; waiting until it is gone")
            said = True
        time.sleep(_LOOK_AGAIN_SECONDS)


def _is_done(folder: RunFolder, loaded: LoadedRecipe, stop_after: int | None) -> bool:
    completed = folder.completed_step()
    if completed is not None and completed >= loaded.recipe.tokens.train_steps:
        return True
    return stop_after is not None and saved_step(folder) >= stop_after


def _end(folder: RunFolder, loaded: LoadedRecipe, arguments: Namespace, termination: Termination) -> int:
    failure = termination.until_asked(_finish, folder, loaded) or folder.failure()
    step, is_done = saved_step(folder), _is_done(folder, loaded, arguments.stop_after)
    _say(arguments, f"srun ended with {arguments.srun_code} after step {step}")
    attempts = read_attempts(folder.path)
    own = [a for a in attempts if (a.begin.job, a.begin.restart) == (arguments.job_id, arguments.restart)]
    if not own:  # its record was lost: as if it had begun now
        begin = Begin(arguments.job_id, arguments.restart, [], now(), step)
        own = [Attempt(begin, [], None)]
    history = [attempt for attempt in attempts if attempt not in own]
    slurm = loaded.recipe.slurm
    end = decide(
        [*history, *own],
        step=step,
        is_done=is_done,
        failure=failure,
        asked=arguments.asked or ("TERM" if termination.is_asked else ""),
        slurm=slurm,
        is_cancelled=is_cancelled(arguments.job_id, arguments.restart),  # what is put back then would start again
    )
    write_end(folder.path, arguments.job_id, arguments.restart, end)
    _say(arguments, f"{end.verdict}: {end.reason}")
    if end.verdict == "give up":
        _tell_somebody(folder, loaded, end)
    if end.verdict == "requeue":
        termination.until_asked(_wait_for_slurm, end, own[0], arguments)
        if termination.is_asked and is_cancelled(arguments.job_id, arguments.restart):
            write_end(folder.path, arguments.job_id, arguments.restart, cancelled(step))
            return 1
        termination.ends_all()
        return _put_back(end, arguments, slurm.exclude)
    return 0 if end.verdict == "done" else 1


def _finish(folder: RunFolder, loaded: LoadedRecipe) -> str | None:
    """What follows the last step, where it is taken; why it failed, if it did."""
    from rich.console import Console

    from launch.cli.finish import finish, is_trained

    if folder.completed_step() is not None or not folder.exists() or not is_trained(folder, loaded.recipe):
        return None
    code = finish(folder, loaded.recipe, Console(soft_wrap=True))
    return None if code == 0 else "all steps are trained, and what follows them failed (see the job's log)"


def _wait_for_slurm(end: End, attempt: Attempt, arguments: Namespace) -> None:
    """Wait where a node says nothing, which may be dead. A job that is put back before Slurm has noticed keeps that
    node's GPUs booked (seen with Slurm 22.05); once it has noticed, it puts the job back by itself and ends this
    process."""
    if end.is_failure and {node.node for node in attempt.nodes} != set(attempt.begin.nodes):
        seconds = slurmd_timeout_seconds() + 5
        _say(arguments, f"not every node has said how it ended; waiting {seconds} s for Slurm to look after them")
        time.sleep(seconds)


def _put_back(end: End, arguments: Namespace, excluded: str | None) -> int:
    """Requeue the job: after a failure with a pause, and without the nodes to keep off."""
    try:
        requeue(arguments.job_id)
        if end.keep_off:
            _say(arguments, f"keeping off {', '.join(end.keep_off)}, where failures began repeatedly")
            update_job(arguments.job_id, ExcNodeList=",".join(filter(None, [excluded, *end.keep_off])))
        if end.pause_seconds > _SLURM_S_OWN_HOLD_SECONDS:
            update_job(arguments.job_id, StartTime=f"now+{end.pause_seconds}")
    except (OSError, subprocess.SubprocessError) as error:
        _say(arguments, f"could not be put back into the queue: {error}")
        return 1
    time.sleep(60)  # Slurm ends this process; an exit code now would be booked on the next start
    return 0


def _say(arguments: Namespace, line: str) -> None:
    say(f"[{now()} job {arguments.job_id}.{arguments.restart}] {line}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
