"""The parity harness: the same recipe at many topologies must train the same.

`run_topologies` trains a recipe for a few steps at each topology of a matrix, on this machine's CPU, and returns what
has to agree: losses, gradient norms, and whether every copy of a parameter is bit-equal on all its holders.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as torch_dist

from data.batch import StepBatch
from launch.train.engine import TrainingEngine
from launch.train.initial_shards import InitialShards, compare_initial_shards
from launch.train.replicas import ReplicaCheck
from launch.train.synthetic import synthetic_batch
from model.build import initialize_weights
from nanotron_recipes.loading import recipe_from_mapping
from nanotron_recipes.overrides import apply_overrides
from nanotron_recipes.schedule import learning_rate_at
from nanotron_recipes.topology import Topology, resolve_topology
from parallel.process_groups import EngineContext, init_process_group
from parallel.rank_pool import RankPool

CPU = torch.device("cpu")
"""Where parity is shown, on machines with GPUs as well: any number of ranks fits there."""

BatchFunction = Callable[..., StepBatch]
"""(recipe, topology, step, dp_rank) -> StepBatch; must be importable."""


@dataclass(frozen=True)
class Tolerances:
    """How far two runs of one recipe may be apart.

    Attributes:
        loss: largest difference of a step's loss, nats per token.
        grad_norm: largest relative difference of a step's gradient norm.
    """

    loss: float
    grad_norm: float


FLOAT32 = Tolerances(loss=1e-5, grad_norm=1e-4)
"""What the order of float32 additions may change; correct runs stay below a tenth of it."""

BFLOAT16 = Tolerances(loss=1e-2, grad_norm=3e-2)
"""bfloat16 keeps 8 significant bits (4e-3), and a topology decides where partial sums are rounded. Over 20 steps of the
tests' recipe, topologies are as far from each other (4e-3 and 1.1e-2) as each is from a float32 run (3e-3 and 5e-3)."""


@dataclass(frozen=True)
class TopologyResult:
    """What a run at one topology did.

    Attributes:
        name: the overrides that made it.
        world_size: number of ranks.
        losses: loss of each step, nats per token.
        grad_norms: gradient norm of each step.
        unequal_copies: global names of parameters that are not bit-equal on all their holders at the end.
        num_shared: how many parameters, or shards of one, were compared.
        weights_digest: sha256 of rank 0's flat parameters at the end: equal for bit-identical runs.
        initial_shards: whether shards of different ranks or layers started alike.
    """

    name: str
    world_size: int
    losses: list[float]
    grad_norms: list[float]
    unequal_copies: list[str] = field(default_factory=list)
    num_shared: int = 0
    weights_digest: str = ""
    initial_shards: InitialShards = field(default_factory=InitialShards)


def run_topologies(
    recipe: dict[str, object],
    matrix: Sequence[Sequence[str]],
    *,
    num_steps: int = 20,
    pool: RankPool | None = None,
    batches: BatchFunction = synthetic_batch,
    plant: Callable[[TrainingEngine], None] | None = None,
) -> list[TopologyResult]:
    """Train `recipe` for `num_steps` steps at each topology.

    Args:
        recipe: a recipe as a mapping, as it stands in its file.
        matrix: for each run the overrides of the recipe, e.g. ``["parallelism.tp=2", "tokens.micro_batch_size=1"]``.
        pool: ranks to run on; a pool of the size needed is started and closed where none is given.
        batches: where the samples come from; must be importable.
        plant: changes each rank's engine before its weights are drawn: how the tests plant bugs.

    Raises:
        UserError: a topology that the recipe does not allow.
        RankFailure: a rank raised or hung.
    """
    cases = []
    for overrides in matrix:
        mapping, _ = apply_overrides(recipe, overrides)
        topology = resolve_topology(recipe_from_mapping(mapping, source="parity").recipe)
        cases.append((" ".join(overrides) or "as written", mapping, topology))
    if pool is not None:
        return [_run_case(pool, *case, num_steps, batches, plant) for case in cases]
    # Ranks answer at the end of all steps, however long those take; ranks that die are seen at once.
    with RankPool(max(topology.world_size for _, _, topology in cases), timeout=timedelta(days=7)) as own_pool:
        return [_run_case(own_pool, *case, num_steps, batches, plant) for case in cases]


def _run_case(
    pool: RankPool,
    name: str,
    mapping: dict[str, object],
    topology: Topology,
    num_steps: int,
    batches: BatchFunction,
    plant: Callable[[TrainingEngine], None] | None,
) -> TopologyResult:
    results = pool.run(topology.world_size, train_on_rank, name, mapping, num_steps, batches, plant)
    first: TopologyResult = results[0]
    assert all(result.losses == first.losses for result in results), "ranks report different losses"
    return first


def train_on_rank(
    name: str,
    mapping: dict[str, object],
    num_steps: int,
    batches: BatchFunction,
    plant: Callable[[TrainingEngine], None] | None,
) -> TopologyResult:
    """One rank's part of a run; called on every rank of the world."""
    engine = start_engine(mapping, plant)
    recipe, topology, dp_rank = engine.recipe, engine.topology, engine.context.dp_rank
    initial_shards = compare_initial_shards(engine.built.buckets, engine.context)
    steps = [
        engine.train_step(batches(recipe, topology, step, dp_rank), learning_rate_at(recipe, step))
        for step in range(1, num_steps + 1)
    ]
    unequal, num_shared = compare_copies(engine)
    result = TopologyResult(
        name=name,
        world_size=topology.world_size,
        losses=[step.loss for step in steps],
        grad_norms=[step.grad_norm for step in steps],
        unequal_copies=unequal,
        num_shared=num_shared,
        weights_digest=_digest(engine),
        initial_shards=initial_shards,
    )
    # Not in a `finally`: leaving waits for all ranks, and after a failure the others never come.
    engine.context.destroy()
    return result


def start_engine(
    mapping: dict[str, object],
    plant: Callable[[TrainingEngine], None] | None = None,
    device: torch.device = CPU,
) -> TrainingEngine:
    """Join the world and build this rank's engine with the initial weights of the recipe.

    The caller ends with `engine.context.destroy()`.
    """
    recipe = recipe_from_mapping(mapping, source="parity").recipe
    init_process_group(device)
    topology = resolve_topology(recipe, torch_dist.get_world_size())
    engine = TrainingEngine(recipe, topology, EngineContext(topology.dp, topology.pp, topology.tp, device))
    if plant is not None:
        plant(engine)
    initialize_weights(engine.built)
    return engine


def largest_differences(reference: TopologyResult, result: TopologyResult) -> tuple[float, float]:
    """Over the steps of `result`: largest difference of the losses, largest relative one of the gradient norms.

    A difference that is no number counts as infinite.
    """
    assert len(result.losses) <= len(reference.losses), "the reference has fewer steps"
    losses = zip(result.losses, reference.losses, strict=False)
    norms = zip(result.grad_norms, reference.grad_norms, strict=False)
    differences = [abs(ours - theirs) for ours, theirs in losses]
    ratios = [abs(ours / theirs - 1) for ours, theirs in norms]
    return _largest(differences), _largest(ratios)


def disagreements(reference: TopologyResult, result: TopologyResult, tolerances: Tolerances = FLOAT32) -> list[str]:
    """Why two runs of one recipe are not the same training; empty where they are.

    Args:
        reference: a run with at least as many steps as `result`.

    Returns:
        One sentence for each kind of disagreement, with the measured figure and the limit, and one for each pair of
        shards that started alike.
    """
    loss, grad_norm = largest_differences(reference, result)
    found = []
    if loss > tolerances.loss:
        found.append(f"{result.name}: losses differ by up to {loss:.1e} (allowed: {tolerances.loss:.0e})")
    if grad_norm > tolerances.grad_norm:
        found.append(
            f"{result.name}: gradient norms differ by up to {grad_norm:.1e} relative "
            f"(allowed: {tolerances.grad_norm:.0e})"
        )
    if result.unequal_copies:
        found.append(f"{result.name}: copies differ between ranks: {', '.join(result.unequal_copies)}")
    found += [f"{result.name}: {pair}" for pair in result.initial_shards.related]
    return found


def _largest(differences: Sequence[float]) -> float:
    return max(difference if math.isfinite(difference) else math.inf for difference in differences)


def compare_copies(engine: TrainingEngine) -> tuple[list[str], int]:
    """Compare, bit by bit, every parameter that several ranks hold: across replicas, stages and tensor ranks.

    Returns:
        (names that differ somewhere, number of comparisons), the same on every rank.
    """
    check = ReplicaCheck(engine.built.buckets, engine.context)
    return sorted({difference.name for difference in check.differences()}), check.num_shared


def _digest(engine: TrainingEngine) -> str:
    digest = hashlib.sha256()
    for bucket in engine.built.buckets:
        digest.update(_bytes(bucket.parameters))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
