"""What a launch records and says of itself: how it starts, and how it ends."""

from contextlib import suppress

from launch.train.engine import TrainingEngine
from launch.train.loop import Launch, TrainingLoop, end_event
from launch.train.metrics import Callback, Event
from launch.train.resume import Start
from launch.train.signals import StopRequest
from launch.train.step_line import StepLine
from launch.train.streams import describe
from nanotron_recipes.numbers import counted
from nanotron_recipes.sequences import sequence_length_at
from parallel.process_groups import lost_connection


def run_recorded(loop: TrainingLoop, launch: Launch, callbacks: list[Callback], stop: StopRequest) -> int:
    """Train; the last step taken. How it ended is recorded, unless this process is killed."""
    try:
        last = loop.run(stop)
    except BaseException as error:
        with suppress(OSError):
            tell(callbacks, end_event("failed", why_failed(error)))
        raise
    if last == launch.recipe.tokens.train_steps:
        tell(callbacks, end_event("done", "every step is trained"))
    else:
        tell(callbacks, end_event("stopped", _why_stopped(launch, last)))
    return last


def why_failed(error: BaseException) -> str:
    """What ended a launch, in a line."""
    lost = lost_connection(error)
    if lost is not None:
        return f"the connection to another rank was lost: {lost}"
    return describe(error) or type(error).__name__


def tell(callbacks: list[Callback], event: Event) -> None:
    """Record an event, and show it where people look."""
    for callback in callbacks:
        callback.on_event(event)


def say_beside_steps(callbacks: list[Callback], line: str) -> None:
    """A line for people, between those of the steps; on the rank that shows these."""
    for callback in callbacks:
        if isinstance(callback, StepLine):
            callback.print(line)


def _why_stopped(launch: Launch, last: int) -> str:
    return "--stop-after" if last == launch.stop_after else "asked to stop"


def say_start(callbacks: list[Callback], engine: TrainingEngine, launch: Launch, start: Start) -> None:
    """Which ranks train what, with which attention, from which checkpoint."""
    topology, attention = engine.topology, engine.built.attention
    lines = [
        f"{launch.folder.path}: dp {topology.dp} · pp {topology.pp} · tp {topology.tp} on "
        f"{engine.context.device.type}, {launch.recipe.model.dtype}; a step is {topology.global_batch_size} × "
        f"{sequence_length_at(launch.recipe, launch.first_step)} tokens = {counted(topology.dp, 'replica')} × "
        f"{counted(topology.num_micro_batches, 'micro-batch')} of {topology.micro_batch_size}",
        f"attention: {attention.name} ({attention.reason})",
        *_about_disks(launch),
        *start.lines(),
    ]
    if launch.first_step > 1:
        lines.append(f"resumed after step {launch.first_step - 1}")
    for line in lines:
        say_beside_steps(callbacks, line)


def _about_disks(launch: Launch) -> list[str]:
    """What a person should know about where checkpoints lie; nothing where one disk has them all."""
    wanted, names = launch.recipe.checkpoints.copies, launch.disks.names
    if len(names) == 1:
        return [f"checkpoints.copies: {wanted}: all nodes share one disk, which gets one"] if wanted > 1 else []
    copies = min(wanted, len(names))
    said = f"checkpoints: {len(names)} nodes have disks of their own ({', '.join(names)})"
    return [f"{said}; each part is written to {copies} of them" if copies > 1 else f"{said}, each keeps its parts"]


def say_end(callbacks: list[Callback], launch: Launch, last: int) -> None:
    """Where a run is saved that did not take its last step."""
    if last < launch.recipe.tokens.train_steps:
        saved = launch.folder.checkpoints / str(last)
        say_beside_steps(callbacks, f"stopped after step {last} ({_why_stopped(launch, last)}); saved in {saved}")
