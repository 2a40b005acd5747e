"""`nanotron-recipes status`."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from nanotron_recipes.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from launch.status.gather import RunStatus

_WATCH_SECONDS = 5.0


def status(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A run: its name or folder. Without: the run last started, and a list."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every five seconds, until it ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say how a run is: step, loss, speed, what is left, its checkpoint, its restarts, its nodes, and what is wrong.

    Examples:

    `nanotron-recipes status`

    `nanotron-recipes status tiny-1 --watch`

    `nanotron-recipes status runs/latest --json`
    """
    from launch.status.runs import find_run, run_paths
    from launch.train.prepare import RUNS
    from launch.train.run_folder import LATEST

    if watch and as_json:
        raise UserError("--watch: shows tables; expected it, or --json")
    if run is None:
        if not run_paths(RUNS):
            print("{}" if as_json else f"{RUNS}/: no run here yet\nnext: nanotron-recipes pretrain tiny")
            return
        run = LATEST if (RUNS / LATEST).exists() else ""
        if not run and (as_json or watch):
            raise UserError(f"{RUNS / LATEST}: leads to no run; expected RUN")
        if not run or (len(run_paths(RUNS)) > 1 and not watch and not as_json):
            _list(RUNS)
        if not run:
            return
    if watch:
        _watch(run, RUNS)
        return
    from dataclasses import asdict

    from rich.console import Console

    from launch.status.gather import gather
    from launch.status.show import status_view

    found = gather(find_run(run, RUNS))
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        Console(soft_wrap=False).print(status_view(found), crop=False)  # the last line is to be pasted


def _list(runs_dir: Path) -> None:
    """A row for each run."""
    from rich.console import Console

    from launch.status.gather import gather
    from launch.status.runs import read_run, run_paths
    from launch.status.show import runs_table

    rows: list[tuple[str, RunStatus | str]] = []
    for path in run_paths(runs_dir):
        try:
            rows.append((path.name, gather(read_run(path))))
        except UserError as error:
            rows.append((path.name, str(error)))
    console = Console()
    console.print(runs_table(rows))
    for name, row in rows:
        for damage in [row] if isinstance(row, str) else row.damage:
            console.print(f"{name}: {damage}", markup=False, highlight=False)
    console.print(f"next: nanotron-recipes status {rows[-1][0]}", markup=False, highlight=False)


def _watch(run: str, runs_dir: Path) -> None:
    """Show the run again and again; a run that has ended is shown once more."""
    from rich.live import Live

    from launch.status.gather import gather
    from launch.status.runs import find_run
    from launch.status.show import status_view

    found = find_run(run, runs_dir)
    with Live(auto_refresh=False) as live:
        while True:
            now = gather(found)
            live.update(status_view(now), refresh=True)
            if now.state in ("complete", "failed", "stopped"):
                return
            time.sleep(_WATCH_SECONDS)
