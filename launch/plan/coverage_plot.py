"""A picture of what a run reads: tokens of every source, by stage."""

from __future__ import annotations

import io
from pathlib import Path

from data.coverage import Coverage
from nanotron_recipes.errors import UserError
from nanotron_recipes.files import write_atomic
from nanotron_recipes.numbers import short_number
from nanotron_recipes.source_names import short_names

_STAGES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours that people with any kind of colour vision can tell apart (Okabe and Ito)."""
_FORMATS = ("png", "svg", "pdf")


def plot_coverage(lines: list[Coverage], out: Path) -> None:
    """Draw a bar for every source, the stages beside each other in it, and how often the source is read, into `out`.

    Raises:
        UserError: `out` is no picture's name.
    """
    from matplotlib.figure import Figure

    kind = out.suffix.removeprefix(".")
    if kind not in _FORMATS:
        raise UserError(f"--plot {out}: expected a name that ends in .{', .'.join(_FORMATS)}")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--plot {out}: expected a file in a folder that is there")
    totals: dict[str, int] = {}
    epochs: dict[str, float | None] = {}
    for line in lines:
        totals[line.source] = totals.get(line.source, 0) + line.tokens
        epochs[line.source] = line.epochs
    names = sorted(totals, key=lambda name: totals[name])
    places = {name: place for place, name in enumerate(names)}
    figure = Figure(figsize=(9, 1.4 + 0.2 * len(names)), dpi=110, layout="constrained")
    axes = figure.subplots()
    read = dict.fromkeys(names, 0)
    for number, stage in {line.number: line.stage for line in lines}.items():
        mine = [line for line in lines if line.number == number]
        where, widths = [places[line.source] for line in mine], [line.tokens for line in mine]
        lefts = [read[line.source] for line in mine]
        axes.barh(where, widths, left=lefts, color=_STAGES[number % len(_STAGES)], height=0.75, label=stage)
        for line in mine:
            read[line.source] += line.tokens
    for name, place in places.items():
        number_of_epochs = epochs[name]
        often = "" if number_of_epochs is None else f", {number_of_epochs:.2f} epochs"
        axes.text(totals[name], place, f"  {short_number(totals[name])}{often}", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), list(short_names(names).values()), fontsize=7)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(0, 1.25 * max(totals.values(), default=1) or 1)
    axes.xaxis.set_major_formatter(lambda value, _: short_number(int(value)))
    axes.set_xlabel("tokens read in the run")
    axes.legend(loc="lower right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format=kind)
    write_atomic(out, picture.getvalue())
