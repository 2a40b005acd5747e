"""One rank of a run, from its start to its end."""

import logging
import os
import signal
import socket
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from launch.cluster.parent_death import signal_when_parent_ends
from launch.cluster.threads import gpus_here
from launch.storage.resume import StoreUnreachable
from launch.storage.uploads import Uploads, start_uploads
from launch.train.callbacks import make_callbacks
from launch.train.checkpoint_owner import held_checkpoints
from launch.train.engine import TrainingEngine
from launch.train.guards import RunFailed
from launch.train.hardware import peak_of_world
from launch.train.loop import Launch, TrainingLoop, start_event
from launch.train.metrics import Callback, RecordsLost
from launch.train.narration import run_recorded, say_beside_steps, say_end, say_start, tell, why_failed
from launch.train.outage import reason
from launch.train.prepare import RunRequest, prepare_run, reason_not_to_train
from launch.train.rank_reporter import RankPlace, RankReporter
from launch.train.resume import find_start, gather_on_first_node, load_start, refuse_foreign_steps
from launch.train.run_folder import RunFolder
from launch.train.run_lock import RunLock
from launch.train.same_data import open_same_data
from launch.train.signals import StopRequest
from launch.train.streams import describe, say, tolerate_lost_output
from launch.train.tracing import StepTracer
from launch.train.webhook import Webhook
from model.build import initialize_weights
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.machine import GPUS_VARIABLE
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.topology import resolve_topology
from parallel.checkpoint_disks import find_disks
from parallel.checkpoint_writer import SaveFailed
from parallel.determinism import deterministic_kernels
from parallel.process_groups import EngineContext, init_process_group, lost_connection, pick_device, why_no_cuda

_LONGER_THAN_ENDING_SECONDS = 2.0
_AFTER_STOP_SECONDS = 10.0
"""How long a launch that was asked to stop waits for uploads: whoever asks may not wait for long."""


@dataclass(frozen=True)
class _Share:
    """What rank 0 tells the others when a launch begins: where the run is, or why there is nothing to train."""

    recipe_file: str = ""
    launch_id: str = ""
    mistake: str = ""
    is_done: bool = False


def train(arguments: Namespace, stop: StopRequest) -> int:
    """Train as this rank of the world that torchrun made; returns the exit code."""
    tolerate_lost_output()
    try:
        return _train(arguments, stop)
    except OSError as error:
        # Of this rank alone: the others are in a collective, and whoever started the ranks ends them.
        say(f"error: {describe(error)}", error=True)
        return 1
    except RuntimeError as error:
        # Where another rank was killed, whoever started the ranks says which.
        if lost_connection(error) is None:
            raise
        say(f"error: {why_failed(error)}", error=True)
        return 1


def _train(arguments: Namespace, stop: StopRequest) -> int:
    try:
        device = _join_world(arguments.local_rank)
    except UserError as error:
        say(f"error: {error}", error=True)
        return 2
    except torch_dist.DistError as error:
        address, why = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", describe(error).partition(". ")[0]
        say(f"error: the ranks did not meet at MASTER_ADDR:MASTER_PORT {address}: {why}", error=True)
        return 1 if arguments.launch_id or arguments.job_launch else 2  # our launchers know it: a rank was lost
    if arguments.parent is not None:
        signal_when_parent_ends(signal.SIGTERM, arguments.parent)
    share = _agree_on_run(arguments)
    if share.mistake:
        return _refuse(share.mistake, stop)
    if share.is_done:
        torch_dist.destroy_process_group()
        return 0
    recipe_file = Path(share.recipe_file)
    recipe = load_recipe(str(recipe_file)).recipe
    folder = RunFolder.of(recipe_file.parent.parent, recipe_file.parent.name, recipe, _node_name(arguments))
    try:
        with ExitStack() as stack:
            if torch_dist.get_rank() == 0:
                stack.enter_context(RunLock.acquire(folder.path, share.launch_id))
                folder.forget_failure()
            stack.enter_context(deterministic_kernels(recipe.general.deterministic, device))
            _train_run(folder, recipe, device, arguments, stop, share.launch_id)
    except UserError as error:
        return _refuse(str(error), stop)
    except RunFailed as failure:
        _tell_somebody(folder, recipe, failure.step, str(failure))
        return _fail(folder, failure)
    except SaveFailed as failure:
        _tell_somebody(folder, recipe, None, str(failure))
        return _end(f"{folder.path}: {failure}", 1)
    except StoreUnreachable as failure:
        return _end(f"{folder.path}: {failure}", 1)
    except RecordsLost as lost:
        return _end(str(lost), 1)
    return 0


def _join_world(local_rank: int) -> torch.device:
    device = pick_device(local_rank)
    here = gpus_here()
    if device.type == "cpu" and here:
        raise UserError(
            f"GPUs here: {here}; torch {torch.__version__} can use none of them: {why_no_cuda()}; expected a torch and "
            "a driver that fit, or ranks that are to be on the CPUs: --gpus-per-node 0, slurm.gpus_per_node: 0, or an "
            f"empty {GPUS_VARIABLE} where they are started by hand"
        )
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(f"LOCAL_RANK: {local_rank}: {torch.cuda.device_count()} GPUs are here; start a rank for each")
    init_process_group(device)
    return device


def _fail(folder: RunFolder, failure: RunFailed) -> int:
    """All ranks come here; the first says why, and leaves word for whoever would start the run again."""
    if torch_dist.get_rank() == 0:
        say(f"error: {folder.path}: {failure}", error=True)
        try:
            folder.mark_failed(failure.kind, failure.step, str(failure))
        except OSError as error:
            say(f"{folder.failed_file}: could not be written: {reason(error)}", error=True)
    torch_dist.destroy_process_group()
    return 1


def _tell_somebody(folder: RunFolder, recipe: Recipe, step: int | None, message: str) -> None:
    if torch_dist.get_rank() == 0:
        with Webhook.of(recipe, folder.name) as webhook:
            webhook.send("failed", step, message)


def _refuse(mistake: str, stop: StopRequest) -> int:
    """Mostly all ranks find the same mistake; then the first one tells it, ends, and the others are asked to stop. A
    rank that finds something alone is asked nothing and tells it itself."""
    if torch_dist.get_rank() > 0:
        time.sleep(_LONGER_THAN_ENDING_SECONDS)
        if not stop.is_set:
            say(f"error: {mistake}", error=True)
    return _end(mistake, 2)


def _end(message: str, code: int) -> int:
    if not torch_dist.is_initialized():  # at the very end, where each rank is alone
        say(f"error: {message}", error=True)
        return code
    if torch_dist.get_rank() == 0:
        say(f"error: {message}", error=True)
    torch_dist.destroy_process_group()
    return code


def _agree_on_run(arguments: Namespace) -> _Share:
    """Under our launcher the run is prepared; started by hand with torchrun, rank 0 prepares it."""
    if arguments.launch_id:
        return _Share(recipe_file=arguments.recipe, launch_id=arguments.launch_id)
    shared = [_prepare(arguments) if torch_dist.get_rank() == 0 else _Share()]
    torch_dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _prepare(arguments: Namespace) -> _Share:
    try:
        prepared = prepare_run(
            RunRequest(
                load_recipe(arguments.recipe, arguments.set or []), arguments.run, launch_id=arguments.job_launch
            )
        )
    except (UserError, OSError) as error:
        return _Share(mistake=describe(error))
    for change in prepared.changes:
        say(f"changed: {change}")
    reason = reason_not_to_train(prepared, arguments.stop_after)
    if reason is None:
        for note in prepared.notes:
            say(f"note: {note}")
        return _Share(str(prepared.folder.recipe_file), prepared.launch_id)
    prepared.lock.release()
    say(reason)
    return _Share(is_done=True)


def _train_run(
    folder: RunFolder, recipe: Recipe, device: torch.device, arguments: Namespace, stop: StopRequest, launch_id: str
) -> None:
    level = recipe.logging.log_level if torch_dist.get_rank() == 0 else recipe.logging.log_level_replica
    if level != "passive":
        logging.getLogger("nanotron").setLevel(level.upper())
    plan = open_same_data(recipe, _node_name(arguments))
    topology = resolve_topology(recipe, torch_dist.get_world_size())
    context = EngineContext(topology.dp, topology.pp, topology.tp, device)
    engine = TrainingEngine(recipe, topology, context)
    node, is_shared = _node_name(arguments), recipe.checkpoints.checkpoints_path_is_shared_file_system
    disks = find_disks(folder.checkpoints, node, is_shared=is_shared)
    with ExitStack() as stack:
        stack.enter_context(held_checkpoints(folder, disks, launch_id))
        uploads = start_uploads(folder, recipe, disks, node, launch_id)
        if uploads is not None:
            stack.callback(uploads.end)
        start = find_start(folder, recipe, plan.fingerprint_through, disks, node)
        refuse_foreign_steps(folder, start, recipe.tokens.train_steps)
        first_step = start.first_step
        state: dict[str, Any] = {}
        if start.checkpoint is not None:
            state = load_start(start, engine.built.buckets, engine.optimizer)
        else:
            initialize_weights(engine.built)
        launch = Launch(
            folder=folder,
            recipe=recipe,
            plan=plan,
            first_step=first_step,
            stop_after=arguments.stop_after,
            peak_flops=peak_of_world(device, recipe.model.dtype),
            files={"recipe.yaml": folder.recipe_file.read_text()},
            disks=disks,
            refused=start.refused,
            spikes=state.get("spikes", {}) if first_step > 1 else {},
            uploads=uploads,
        )
        tracer = None
        if recipe.profiler is not None and recipe.profiler.profiler_export_path is not None:
            tracer = StepTracer(folder.path, recipe.profiler, first_step, context.rank)
            stack.enter_context(_closing(tracer))
        reporter = RankReporter(folder.path, RankPlace.of(context, node, launch_id), device)
        stack.enter_context(_closing(reporter))
        callbacks = []
        if context.rank == 0:
            callbacks = make_callbacks(launch, stop, is_job=arguments.job_launch is not None)
        for callback in callbacks:
            stack.enter_context(_closing(callback))
        tell(callbacks, start_event(engine, launch, launch_id))
        say_start(callbacks, engine, launch, start)
        loop = TrainingLoop(launch, engine, callbacks, tracer, reporter)
        last = run_recorded(loop, launch, callbacks, stop)
        if last == recipe.tokens.train_steps and recipe.checkpoints.export_at_end:
            gather_on_first_node(folder, last, disks)
        context.destroy()  # what follows is done by some ranks alone
        if uploads is not None:
            _end_uploads(loop, uploads, launch, stop, callbacks)
    say_end(callbacks, launch, last)
    by_hand = not arguments.launch_id and not arguments.job_launch
    if context.rank == 0 and last == recipe.tokens.train_steps and by_hand:
        _end_by_hand(launch)


def _end_uploads(
    loop: TrainingLoop, uploads: Uploads, launch: Launch, stop: StopRequest, callbacks: list[Callback]
) -> None:
    """A run that has trained all its steps waits for its uploads; one that was asked to stop, for a moment only."""
    assert launch.recipe.s3_upload is not None
    seconds = float(launch.recipe.s3_upload.longest_wait_seconds)
    if stop.is_set:
        seconds = min(seconds, _AFTER_STOP_SECONDS)
    left = loop.end_uploads(uploads, seconds, stop, partial(say_beside_steps, callbacks))
    if left:
        next_line = f"nanotron-recipes checkpoints push {launch.folder.path}"
        say_beside_steps(callbacks, f"not in the store: steps {', '.join(map(str, left))}; next: {next_line}")


def _node_name(arguments: Namespace) -> str:
    return arguments.node_name or socket.gethostname()


@contextmanager
def _closing(thing: Callback | StepTracer | RankReporter) -> Iterator[None]:
    """Close it at the end; where the body failed, that is what is raised, and of files only what they lack is said."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            try:
                thing.close()
            except RecordsLost as lost:
                say(str(lost), error=True)
        raise
    thing.close()


def _end_by_hand(launch: Launch) -> None:
    """Without our launcher nobody exports; a run that has nothing to export is complete."""
    if launch.recipe.checkpoints.export_at_end:
        say(f"next: nanotron-recipes pretrain {launch.folder.recipe_file} --run {launch.folder.name}  (exports)")
    else:
        launch.folder.mark_completed(launch.recipe.tokens.train_steps)
