"""Whether a user's recipe trains the same at several topologies of this machine; every rank is a process on its CPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import psutil

from data.batch import StepBatch
from data.plan import DataPlan
from model.arithmetic import num_parameters
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import LoadedRecipe, dump_yaml, recipe_from_mapping
from nanotron_recipes.overrides import apply_overrides
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.topology import Topology, global_batch_size, local_world_size, resolve_topology
from nanotron_recipes.unsupported import unsupported_features
from nanotron_recipes.yaml_text import parse_yaml

if TYPE_CHECKING:
    from launch.train.engine import TrainingEngine
    from launch.train.parity import BatchFunction, Tolerances, TopologyResult
    from parallel.rank_pool import RankPool

AXES = ("dp", "pp", "tp")


_SIZE = re.compile("[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class Grid:
    """A topology to train at."""

    dp: int = 1
    pp: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Read `dp=2,tp=1`; what is not named is 1. Raises UserError."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = (piece.strip() for piece in part.partition("="))
            if axis not in AXES or axis in sizes or not _SIZE.fullmatch(size):
                raise UserError(f"--topology {text}: expected a list such as dp=2,pp=1,tp=2, each once")
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def num_ranks(self) -> int:
        """Processes."""
        return self.dp * self.pp * self.tp

    def overrides(self, batch: int) -> list[str]:
        """What makes a recipe train at this topology, with `batch` sequences a step as at every other."""
        grid = [f"parallelism.{axis}={getattr(self, axis)}" for axis in AXES]
        return [*grid, f"tokens.global_batch_size={batch}", "tokens.batch_accumulation_per_replica=null"]

    def __str__(self) -> str:
        return f"dp {self.dp} · pp {self.pp} · tp {self.tp}"


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        results: of every topology; the first is the reference of the others.
        tolerances: what is allowed between two of them.
        disagreements: one sentence each; empty where all topologies train the same.
    """

    results: list[TopologyResult]
    tolerances: Tolerances
    disagreements: list[str]


class OwnBatches:
    """The recipe's own data (a `BatchFunction`). A rank opens the shards when it is first asked."""

    def __init__(self) -> None:
        self._plan: DataPlan | None = None

    def __call__(self, recipe: Recipe, topology: Topology, step: int, dp_rank: int) -> StepBatch:
        if self._plan is None:
            self._plan = DataPlan.from_recipe(recipe)
        return self._plan.step(
            step,
            dp=topology.dp,
            dp_rank=dp_rank,
            num_micro_batches=topology.num_micro_batches,
            micro_batch_size=topology.micro_batch_size,
        )


def choose_batches(recipe: Recipe) -> tuple[BatchFunction, str]:
    """What to train on, and what to tell the user: the recipe's data where it is there, else random tokens."""
    from launch.train.synthetic import synthetic_batch

    try:
        DataPlan.from_recipe(recipe)
    except UserError as error:
        return synthetic_batch, f"synthetic tokens ({error})"
    return OwnBatches(), "the recipe's own"


def choose_grids(recipe: Recipe, asked: Sequence[str]) -> list[Grid]:
    """The topologies to compare, the reference first.

    Args:
        asked: none: one rank, and the recipe's own topology here. One: one rank, and that. Several: those.

    Raises:
        UserError: the recipe cannot be trained by this version, or there is nothing to compare.
    """
    features = unsupported_features(recipe)
    if features:
        raise UserError("; ".join(features))
    grids = [Grid.parse(text) for text in asked]
    if not grids:
        own = resolve_topology(recipe, local_world_size(recipe))
        grids = [Grid(own.dp, own.pp, own.tp)]
        if grids == [Grid()]:
            raise UserError("the recipe trains on one rank here: nothing to compare; name a topology: --topology tp=2")
    if len(grids) == 1:
        grids.insert(0, Grid())
    repeated = next((grid for grid in grids if grids.count(grid) > 1), None)
    if repeated is not None:
        raise UserError(f"--topology: {repeated} is compared with itself; expected different topologies")
    return grids


def check_comparable(recipe: Recipe, grids: Sequence[Grid], num_steps: int) -> None:
    """Raise UserError for more steps than the recipe has, a topology that it does not allow, or one that does not fit
    into this machine's free memory."""
    if num_steps > recipe.tokens.train_steps:
        raise UserError(f"--steps {num_steps}: expected at most tokens.train_steps {recipe.tokens.train_steps}")
    mapping = parse_yaml(dump_yaml(recipe), "recipe")
    for grid in grids:
        changed, _ = apply_overrides(mapping, grid.overrides(global_batch_size(recipe)))
        resolve_topology(recipe_from_mapping(changed, source=str(grid)).recipe)
    free = psutil.virtual_memory().available
    for grid in grids:
        needed = _bytes_of_state(recipe, grid)
        if needed > free:
            raise UserError(
                f"{grid}: expected {needed / 2**30:.1f} GiB of free memory for weights, gradients and optimizer state "
                f"of its {grid.num_ranks} processes, found {free / 2**30:.1f}; fewer layers show the same: "
                "--set model.model_config.num_hidden_layers=…"
            )


def _bytes_of_state(recipe: Recipe, grid: Grid) -> int:
    """Of all ranks: weights and float32 gradients on every replica; float32 copies and moments with ZeRO-1 once."""
    has_own_copy = recipe.model.dtype != "float32"
    everywhere, divided = (2 + 4, 4 + 8) if has_own_copy else (4 + 4, 8)
    copies = 1 if recipe.optimizer.zero_stage > 0 else grid.dp
    return num_parameters(recipe, padded=True) * (everywhere * grid.dp + divided * copies)


def compare_grids(
    loaded: LoadedRecipe,
    grids: Sequence[Grid],
    num_steps: int,
    batches: BatchFunction,
    *,
    pool: RankPool | None = None,
    plant: Callable[[TrainingEngine], None] | None = None,
) -> Comparison:
    """Train the first steps at every topology and compare.

    Args:
        pool: ranks to run on; one is started and closed where none is given.
        plant: see `run_topologies`.

    Raises:
        UserError: a topology that the recipe does not allow.
        RankFailure: a rank raised or hung.
    """
    from launch.train.parity import BFLOAT16, FLOAT32, run_topologies

    mapping = parse_yaml(dump_yaml(loaded.recipe), loaded.path.name)
    matrix = [grid.overrides(global_batch_size(loaded.recipe)) for grid in grids]
    found = run_topologies(mapping, matrix, num_steps=num_steps, batches=batches, pool=pool, plant=plant)
    results = [replace(result, name=str(grid)) for result, grid in zip(found, grids, strict=True)]
    tolerances = BFLOAT16 if loaded.recipe.model.dtype == "bfloat16" else FLOAT32
    return Comparison(results, tolerances, list(_disagreements(results, tolerances)))


def _disagreements(results: Sequence[TopologyResult], tolerances: Tolerances) -> Iterator[str]:
    from launch.train.parity import disagreements

    # Compared with itself the reference still tells of copies that differ and of shards that start alike.
    for result in results:
        yield from disagreements(results[0], result, tolerances)
