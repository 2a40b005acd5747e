"""`nanotron-recipes verify-topology`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.options import OverrideOption, RecipeArgument

if TYPE_CHECKING:
    from rich.console import Console

    from launch.train.parity import TopologyResult
    from launch.train.verify_topology import Comparison


def verify_topology(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(
            metavar="dp=N,pp=N,tp=N",
            help="Compare this one; may be repeated; of several the first is the reference, of one a single rank.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to train at each topology.")] = 5,
) -> None:
    """Show on this machine that two topologies give the same first steps, and that no two shards start alike.

    Compares one rank with the recipe's own topology, or with the one that is named, or several that are named. Every
    rank is a process on the CPU. Exits with 1 where they disagree.

    Examples:

    `nanotron-recipes verify-topology tiny`

    `nanotron-recipes verify-topology tiny --topology dp=2,tp=2 --topology pp=2`
    """
    from rich.console import Console

    from launch.train.verify_topology import check_comparable, choose_batches, choose_grids, compare_grids
    from nanotron_recipes.loading import load_recipe
    from nanotron_recipes.machine import check_local_ranks
    from parallel.rank_pool import RankFailure

    loaded = load_recipe(recipe, overrides or [])
    grids = choose_grids(loaded.recipe, topology or [])
    check_local_ranks(max(grid.num_ranks for grid in grids))
    check_comparable(loaded.recipe, grids, steps)
    batches, data = choose_batches(loaded.recipe)
    console = Console(soft_wrap=True, highlight=False)
    names = ", ".join(str(grid) for grid in grids)
    console.print(f"{loaded.name}: {steps} steps in {loaded.recipe.model.dtype} on the CPU at {names} …", markup=False)
    console.print(f"data: {data}", markup=False)
    try:
        comparison = compare_grids(loaded, grids, steps, batches)
    except RankFailure as failure:
        print(f"error: {failure}", file=sys.stderr)
        raise typer.Exit(1) from None
    print_comparison(comparison, console)
    raise typer.Exit(1 if comparison.disagreements else 0)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print a table for every topology beside the reference, what else was compared, and the verdict."""
    reference, *others = comparison.results
    for other in others:
        _print_steps(reference, other, console)
    for result in comparison.results:
        shards, copies = result.initial_shards, "no parameter is on several ranks"
        if result.num_shared:
            equal = f"{len(result.unequal_copies)} differ" if result.unequal_copies else "all equal to the bit"
            copies = f"{result.num_shared} copies after the last step: {equal}"
        alike = f"{len(shards.related)} start alike" if shards.related else "none start alike"
        console.print(
            f"{result.name}: {copies}; {shards.num_pairs} pairs of shards: {alike} "
            f"(largest correlation {shards.largest:.3f})",
            markup=False,
        )
    tolerances = comparison.tolerances
    allowed = f"allowed: losses {tolerances.loss:.0e}, gradient norms {tolerances.grad_norm:.0e} relative"
    if not comparison.disagreements:
        console.print(f"verdict: the same training ({allowed})")
        return
    console.print(f"verdict: not the same training ({allowed})")
    for line in comparison.disagreements:
        console.print(f"  {line}", markup=False)


def _print_steps(reference: TopologyResult, other: TopologyResult, console: Console) -> None:
    from rich.table import Table

    table = Table(title=f"{reference.name}  and  {other.name}", title_justify="left")
    for head in ("step", "loss", "loss", "difference", "norm", "norm", "relative"):
        table.add_column(head, justify="right")
    losses = zip(reference.losses, other.losses, strict=True)
    norms = zip(reference.grad_norms, other.grad_norms, strict=True)
    for step, ((loss_a, loss_b), (norm_a, norm_b)) in enumerate(zip(losses, norms, strict=True), start=1):
        relative = norm_b / norm_a - 1 if norm_a else float("nan")
        table.add_row(
            str(step),
            f"{loss_a:.6f}",
            f"{loss_b:.6f}",
            f"{loss_b - loss_a:+.1e}",
            f"{norm_a:.5f}",
            f"{norm_b:.5f}",
            f"{relative:+.1e}",
        )
    console.print(table)
