"""A run's status for people."""

import os
import shlex
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.cli.next_line import command, tool
from launch.status.evaluation import evaluation_text, figure
from launch.status.gather import RunStatus
from launch.status.nodes import SILENT_SECONDS, NodeStatus
from launch.status.uploads import uploads_text
from launch.train.step_line import format_bytes, format_seconds

_SHOWN_RESTARTS = 8
_SHOWN_THROTTLED = 3
_SHOWN_NODES = 16


def status_view(status: RunStatus) -> RenderableType:
    """Everything about one run, and at the end what to do next."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text, style in _facts(status):
        facts.add_row(name, Text(text, style=style))
    parts: list[RenderableType] = [facts]
    if len(status.restarts) > 1 or any(start.time for start in status.restarts):
        parts.append(_restarts_table(status))
    if status.nodes:
        parts.append(_nodes_table(status.nodes, is_training=status.state == "training"))
    parts.append(Text(f"next: {next_command(status)}", no_wrap=True, overflow="ignore"))  # to be pasted
    return Group(*parts)


def _facts(status: RunStatus) -> Iterator[tuple[str, str, str]]:
    bad = "bold red"
    state = f"{status.state}: {status.message}" if status.message else status.state
    yield status.path, state, bad if status.state in ("failed", "unknown") else ""
    for damage in status.damage:
        yield "DAMAGED", damage, bad
    if status.step:
        share = status.step / status.train_steps
        loss = "not finite" if status.loss is None else f"{status.loss:.4f}"
        yield "step", f"{status.step:,} of {status.train_steps:,} ({share:.1%}), {status.tokens:,} tokens", ""
        yield "loss", f"{loss} ({status.stage})", ""
    if status.tokens_per_second is not None:
        yield "speed", _speed(status), ""
    if status.drop is not None:
        lasting = "" if status.slow_seconds is None else f", for {format_seconds(status.slow_seconds)}"
        yield "SLOW", f"{status.drop}{lasting}", bad
    for ranks in status.slow_ranks:
        yield "SLOW RANK", str(ranks), bad
    if status.quiet_seconds is not None:
        yield "QUIET", f"no record for {format_seconds(status.quiet_seconds)}", bad
    if status.eta_seconds is not None:
        end = datetime.fromtimestamp(datetime.now().timestamp() + status.eta_seconds)
        yield "left", f"{format_seconds(status.eta_seconds)}, until {end:%Y-%m-%d %H:%M}", ""
    yield "checkpoint", *_checkpoint(status)
    if status.uploads is not None:
        text, is_bad = uploads_text(status.uploads, is_training=status.state == "training")
        yield "uploads", text, bad if is_bad else ""
    if status.validation:
        losses = "  ".join(f"{name} {figure(loss)}" for name, loss in status.validation.items())
        yield "validation", f"{losses} (nats/token)", ""
    if status.evaluation:
        yield "evaluation", evaluation_text(status.evaluation), bad if status.evaluation.get("error") else ""


def _speed(status: RunStatus) -> str:
    parts = [f"{status.tokens_per_second:,.0f} tokens/s", f"{status.step_seconds or 0:.2f} s a step"]
    if status.usual_tokens_per_second is not None:
        of_all = "" if status.is_whole_record else ", from a part of its records"
        parts.insert(1, f"the run's median {status.usual_tokens_per_second:,.0f}{of_all}")
    if status.mfu is not None:
        parts.append(f"mfu {status.mfu:.1%}")
    return " · ".join(parts)


def _checkpoint(status: RunStatus) -> tuple[str, str]:
    found = status.checkpoint
    if found is None:
        return "none yet", ""
    when = "" if found.time is None else f", {datetime.fromtimestamp(found.time):%Y-%m-%d %H:%M}"
    places = [os.path.dirname(place) for place in found.places]
    place = f" in {', '.join(places[:2])}{' …' * (len(places) > 2)}" if places else ""
    if found.nodes:
        where = f"{found.copies} cop{'y' if found.copies == 1 else 'ies'} of each part, on {', '.join(found.nodes)}"
    else:
        where = f"{found.copies} copy" if found.copies else ""
    stored = [] if found.in_store is None else ["in the store" if found.in_store else "not in the store yet"]
    parts = [f"step {found.step}{when}", format_bytes(found.num_bytes), *([where + place] if where else []), *stored]
    text = " · ".join(parts)
    return (f"{text} · {found.problem}", "bold red") if found.problem else (text, "")


def _restarts_table(status: RunStatus) -> Table:
    hidden = len(status.restarts) - _SHOWN_RESTARTS
    count = f"{len(status.restarts)} start{'s' * (len(status.restarts) > 1)}"
    more = f", the last {_SHOWN_RESTARTS}" if hidden > 0 else ""
    table = Table(title=f"{count}{more}", title_justify="left")
    shown = status.restarts[-_SHOWN_RESTARTS:]
    has_nodes = any(start.nodes for start in shown)  # those of a job; a launch by hand has none
    for heading in ("start", "when", *(["nodes"] if has_nodes else []), "after step", "then", "why"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "after step" else "left")
    for start in shown:
        nodes = ", ".join(start.nodes[:3]) + (f" and {len(start.nodes) - 3} more" if len(start.nodes) > 3 else "")
        where = [nodes] if has_nodes else []
        table.add_row(start.start, _local_time(start.time), *where, str(start.after_step), start.verdict, start.reason)
    return table


def _local_time(when: str) -> str:
    """`when`, in ISO 8601, as this machine's clock shows it, to the minute; another text as it is."""
    try:
        return f"{datetime.fromisoformat(when).astimezone():%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError):
        return when


def _nodes_table(nodes: Sequence[NodeStatus], *, is_training: bool) -> Table:
    has_gpus = any(node.gpu for node in nodes)
    shown = list(nodes) if len(nodes) <= _SHOWN_NODES else sorted(nodes, key=_how_bad, reverse=True)[:_SHOWN_NODES]
    which = f", of which {_SHOWN_NODES} to look at first" if len(shown) < len(nodes) else ""
    title = f"{len(nodes)} node{'s' * (len(nodes) > 1)}{which}: of each its worst rank"
    table = Table(title=title, title_justify="left")
    for heading in ("node", "ranks", "heard", "at step", "own s/step", "memory"):
        table.add_column(heading, justify="left" if heading in ("node", "ranks") else "right")
    for heading in ("GPU", "°C", "MHz", "throttled") if has_gpus else ():
        table.add_column(heading)
    for node in shown:
        heard = Text(f"{format_seconds(node.silent_seconds)} ago")
        heard.stylize("bold red" if is_training and node.silent_seconds > SILENT_SECONDS else "")
        own = "n/a" if node.own_seconds is None else f"{node.own_seconds:.3f}"
        gpu = _gpu_cells(node) if has_gpus else []
        table.add_row(node.name, _ranges(node.ranks), heard, str(node.step), own, _memory(node), *gpu)
    return table


def _how_bad(node: NodeStatus) -> tuple[bool, int, float]:
    return node.silent_seconds > SILENT_SECONDS, len(node.throttled), node.own_seconds or 0.0


def _gpu_cells(node: NodeStatus) -> list[RenderableType]:
    temperature = "n/a" if node.temperature_celsius is None else str(node.temperature_celsius)
    clocks = "n/a" if node.sm_clock_mhz is None else f"{node.sm_clock_mhz} of {node.max_sm_clock_mhz}"
    reasons = "; ".join(node.throttled[:_SHOWN_THROTTLED]) + " …" * (len(node.throttled) > _SHOWN_THROTTLED)
    return [node.gpu or "n/a", temperature, clocks, Text(reasons, style="bold red")]


def _memory(node: NodeStatus) -> str:
    if node.gpu_memory_used_bytes is None or node.gpu_memory_total_bytes is None:
        return format_bytes(node.memory_bytes)
    return f"{format_bytes(node.gpu_memory_used_bytes)} of {format_bytes(node.gpu_memory_total_bytes)}"


def _ranges(ranks: Sequence[int]) -> str:
    """`0-3, 8`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def next_command(status: RunStatus) -> str:
    """What a person would call next."""
    path = Path(status.path)
    if status.state == "complete":
        export = path / "export"
        return f"see {export / 'README.md'}" if export.is_dir() else command("nanotron-recipes", "export", path, "OUT")
    if status.state == "training":
        if status.drop is not None or status.slow_ranks:
            # Storage and loader before links, links before compute: what is looked at first.
            return f"look at the data_wait_seconds of {path / 'metrics.jsonl'}, then at the nodes named above"
        return f"{tool('tensorboard')} --logdir {shlex.quote(str(path / 'tensorboard'))}"
    if status.state in ("queued", "begun"):
        of_jobs = [start.start.partition(".")[0] for start in status.restarts if "." in start.start]
        job = status.job or of_jobs[-1]
        return f"squeue --job {job}"
    if status.state == "unknown":
        return f"mend what is damaged, then {command('nanotron-recipes', 'status', path)}"
    cluster = ["--nodes", str(status.job_nodes)] if status.job_nodes else []
    goes_on = command("nanotron-recipes", "pretrain", status.recipe, "--run", status.run, *cluster)
    return f"read {path / 'logs'}, then {goes_on}" if status.state == "failed" else goes_on


def runs_table(statuses: Sequence[tuple[str, RunStatus | str]]) -> Table:
    """A row for each run: its status, or what keeps it from being read."""
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "state", "step", "loss", "tokens/s", "left", "checkpoint"):
        table.add_column(heading, justify="left" if heading in ("run", "state") else "right", no_wrap=True)
    for name, status in statuses:
        if isinstance(status, str):
            table.add_row(name, Text("damaged", style="bold red"), *[""] * 5)
            continue
        is_bad = status.state in ("failed", "unknown") or status.drop is not None or bool(status.slow_ranks)
        state = f"{status.state}, slow" if status.drop is not None or status.slow_ranks else status.state
        table.add_row(
            name,
            Text(state, style="bold red" if is_bad else ""),
            f"{status.step}/{status.train_steps}",
            figure(status.loss),
            "" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}",
            "" if status.eta_seconds is None else format_seconds(status.eta_seconds),
            "" if status.checkpoint is None else str(status.checkpoint.step),
        )
    return table
