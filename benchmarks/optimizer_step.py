"""Milliseconds of norm, clipping and AdamW: our flat buffers beside nanotron's own classes, on the same parameters.

    python benchmarks/optimizer_step.py        [--rounds 9]

Measured at dp 2 on gloo with one thread a rank, in float32, from reduced gradients to updated parameters on every
rank: with ZeRO-0 `clip_grad_norm` and `NamedOptimizer`, with ZeRO-1 `clip_grad_norm` and `ZeroDistributedOptimizer`,
which end with a gather of the parameters. All use torch's AdamW with the same settings.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.report import Section, publish
from benchmarks.rounds import ratios, spread, take_turns
from benchmarks.train_step import SHAPES, recipe_of
from nanotron_recipes.recipe import Recipe

if TYPE_CHECKING:
    from launch.train.engine import TrainingEngine

LEARNING_RATE = 1e-3
STEPS_PER_BLOCK = 10


@dataclass(frozen=True)
class Measurement:
    """One shape and ZeRO stage.

    Attributes:
        seconds: of a step, by contestant and round.
        difference: between the two sides' parameters after the first step, the largest.
        num_parameters: tensors that a rank holds.
    """

    seconds: dict[str, list[float]]
    difference: float
    num_parameters: int


def measure(recipe: Recipe, rounds: int) -> Measurement:
    """Called on both ranks."""
    import torch
    import torch.distributed as torch_dist

    from launch.train.engine import TrainingEngine
    from model.build import initialize_weights
    from nanotron_recipes.topology import resolve_topology
    from parallel.process_groups import EngineContext, init_process_group

    device = torch.device("cpu")
    init_process_group(device)
    topology = resolve_topology(recipe, torch_dist.get_world_size())
    context = EngineContext(topology.dp, topology.pp, topology.tp, device)
    ours, theirs = (TrainingEngine(recipe, topology, context) for _ in range(2))
    for engine in (ours, theirs):
        initialize_weights(engine.built)
        for bucket in engine.built.buckets:
            bucket.gradients.normal_(generator=torch.Generator().manual_seed(1))
    steps = {"ours": our_step(ours), "nanotron": nanotron_step(theirs)}
    for step in steps.values():
        step()
    pairs = zip(ours.built.module.parameters(), theirs.built.module.parameters(), strict=True)
    differences = [float((mine - other).detach().abs().max()) for mine, other in pairs]
    seconds = take_turns(steps, rounds, STEPS_PER_BLOCK)
    context.destroy()
    return Measurement(seconds, max(differences), len(differences))


def our_step(engine: "TrainingEngine") -> Callable[[], None]:
    """Norm, clipping and update as `TrainingEngine.train_step` calls them."""
    max_norm = engine.recipe.optimizer.clip_grad or 1.0

    def step() -> None:
        engine.optimizer.clip(engine.optimizer.grad_norm(), max_norm)
        engine.optimizer.step(LEARNING_RATE)

    return step


def nanotron_step(engine: "TrainingEngine") -> Callable[[], None]:
    """The same with nanotron's classes, on the parameters and gradients of `engine`."""
    from nanotron.optim.clip_grads import clip_grad_norm

    from parallel.parameters import named_parameters

    optimizer, parameters = nanotron_optimizer(engine), list(named_parameters(engine.built.module))
    max_norm = engine.recipe.optimizer.clip_grad or 1.0

    def step() -> None:
        clip_grad_norm(engine.context.mp_pg, parameters, max_norm, grad_accumulator=None)
        optimizer.step()

    return step


def nanotron_optimizer(engine: "TrainingEngine") -> Any:
    """nanotron's own optimizer with the recipe's settings, on the parameters of `engine`."""
    import torch
    from nanotron.optim.named_optimizer import NamedOptimizer
    from nanotron.optim.zero import ZeroDistributedOptimizer

    from model.build import decay_rule
    from parallel.parameters import named_parameters

    recipe, context = engine.recipe, engine.context
    factory, decays = recipe.optimizer.optimizer_factory, decay_rule(recipe)
    parameters = list(named_parameters(engine.built.module))
    groups = [
        {"named_params": [p for p in parameters if decays(p[0])], "weight_decay": recipe.optimizer.weight_decay},
        {"named_params": [p for p in parameters if not decays(p[0])], "weight_decay": 0.0},
    ]

    def adamw(param_groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            param_groups,
            lr=LEARNING_RATE,
            betas=(factory.adam_beta1, factory.adam_beta2),
            eps=factory.adam_eps,
            fused=factory.torch_adam_is_fused,
        )

    def named(named_groups: Any) -> NamedOptimizer:
        return NamedOptimizer(named_groups, adamw)

    sharded = recipe.optimizer.zero_stage > 0
    return ZeroDistributedOptimizer(groups, named, context.dp_pg) if sharded else named(groups)


def main() -> None:
    """Measure every shape with both ZeRO stages, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each contestant that count")
    parser.add_argument("--dry", action="store_true", help="print, but write no result file")
    arguments = parser.parse_args()

    from parallel.rank_pool import RankPool

    rows, differences = [], []
    with RankPool(2) as pool:
        for shape in SHAPES:
            for zero_stage in (0, 1):
                recipe = recipe_of(shape, f"optimizer.zero_stage={zero_stage}")
                result: Measurement = pool.run(2, measure, recipe, arguments.rounds)[0]
                times = [f"{1000 * median(result.seconds[name]):.2f}" for name in ("ours", "nanotron")]
                speedup = spread(ratios(result.seconds["nanotron"], result.seconds["ours"]))
                rows.append((shape, str(result.num_parameters), str(zero_stage), *times, speedup))
                differences.append(result.difference)
    section = Section(
        title="Norm, clipping and AdamW at dp 2, float32",
        columns=("shape", "tensors", "ZeRO", "ours, ms", "nanotron's, ms", "nanotron's / ours"),
        rows=rows,
        notes="Ratio: median (smallest to largest) of the rounds. After one step the parameters of the two sides "
        f"differ by at most {max(differences):.0e}.",
    )
    publish("optimizer-step", "Our optimizer step beside nanotron's", [section], write=not arguments.dry)


if __name__ == "__main__":
    main()
