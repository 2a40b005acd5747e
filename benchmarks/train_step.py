"""Tokens per second of our training step beside a bare loop over transformers' class of the same shape.

    make bench-train        [ARGS="--rounds 8 --only tiny"]

Both loops live in the same processes and take turns, block by block, so that a drift of the machine's speed hits both;
what counts is the median of the rounds' ratios. They start from the same weights and see the same tokens: their losses
are compared at the start and at the end. Everything is float32 on the CPU.
"""

import argparse
from dataclasses import dataclass
from statistics import median
from typing import Final

from benchmarks.report import Section, publish
from benchmarks.rounds import ratios, seconds_of, spread, take_turns
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe

SHAPES = {
    "tiny": ("tiny", ()),
    "hidden 256": (
        "tiny",
        (
            "model.model_config.vocab_size=4096",
            "tokenizer.train.vocab_size=4096",
            "model.model_config.hidden_size=256",
            "model.model_config.intermediate_size=768",
            "model.model_config.max_position_embeddings=512",
            "tokens.sequence_length=512",
            "tokens.global_batch_size=8",
        ),
    ),
}
"""Recipe and overrides. Both have 6 layers, 4 attention and 2 key-value heads and tied embeddings."""

SETTINGS = ((1, 2), (2, 1))
"""(processes, threads of each)."""

LOOPS = {"ours": "ours", "bare": "bare transformers", "masked": "ours, document masks"}
"""Contestants; the bare loop has no document masks, therefore the first two have none."""

MASKING = "model.model_config._use_doc_masking"

FORMULA: Final = "causal"
"""Which floating-point operations the limit counts; see `model.arithmetic.flops_per_token`."""


@dataclass(frozen=True)
class Measurement:
    """One shape in one setting.

    Attributes:
        seconds: of a step, by contestant and round.
        peak_flops: of all ranks together, from a matrix product that all run at once.
        losses: (ours, bare loop) at the first and the last step.
    """

    seconds: dict[str, list[float]]
    peak_flops: float
    losses: tuple[tuple[float, float], tuple[float, float]]


def recipe_of(shape: str, *more_overrides: str) -> Recipe:
    """The recipe of a shape; its whole batch is one micro-batch."""
    name, overrides = SHAPES[shape]
    return load_recipe(name, [*overrides, *more_overrides]).recipe


def measure(plain: Recipe, masked: Recipe, threads: int, rounds: int, block_seconds: float) -> Measurement:
    """Called on every rank of a world of one or two."""
    import torch
    import torch.distributed as torch_dist

    from benchmarks.loops import BareLoop, OurLoop, mean_over_ranks
    from launch.train.hardware import measured_cpu_flops
    from nanotron_recipes.topology import resolve_topology
    from parallel.process_groups import EngineContext, init_process_group

    torch.set_num_threads(threads)
    device = torch.device("cpu")
    init_process_group(device)
    world = torch_dist.get_world_size()
    topology = resolve_topology(plain, world)
    context = EngineContext(topology.dp, topology.pp, topology.tp, device)
    ours, with_masks = (OurLoop(recipe, topology, context) for recipe in (plain, masked))
    bare = BareLoop(plain, topology, context.dp_rank, ours.hf_weights())

    first = ours.step(), mean_over_ranks(bare.step())
    steps = max(1, round(block_seconds / mean_over_ranks(seconds_of(bare.step))))
    ours.step()
    seconds = take_turns({"ours": ours.step, "bare": bare.step, "masked": with_masks.step}, rounds, steps)
    last = ours.step(), mean_over_ranks(bare.step())
    torch_dist.barrier()
    peak = mean_over_ranks(measured_cpu_flops(plain.model.dtype)) * world
    context.destroy()
    return Measurement(seconds, peak, (first, last))


def section_of(shape: str, results: dict[tuple[int, int], Measurement]) -> Section:
    """The table of one shape."""
    from model.arithmetic import flops_per_token, num_parameters

    recipe = recipe_of(shape)
    tokens = recipe.tokens.global_batch_size or 0
    tokens *= recipe.tokens.sequence_length
    flops = flops_per_token(recipe, FORMULA)
    rows: list[tuple[str, ...]] = []
    for (processes, threads), result in results.items():
        limit = result.peak_flops / flops
        for key, name in LOOPS.items():
            rate = tokens / median(result.seconds[key])
            against_bare = ratios(result.seconds["bare"], result.seconds[key])
            row = (f"{processes} × {threads}", name, f"{rate:,.0f}", f"{rate / limit:.0%}")
            rows.append((*row, "" if key == "bare" else spread(against_bare)))
    first, last = (
        max(abs(ours - bare) for ours, bare in (result.losses[when] for result in results.values())) for when in (0, 1)
    )
    return Section(
        title=f"{shape}: {num_parameters(recipe):,} parameters, {recipe.tokens.global_batch_size} sequences of "
        f"{recipe.tokens.sequence_length} tokens a step, float32",
        columns=("processes × threads", "loop", "tokens/s", "of the limit", "ratio to the bare loop"),
        rows=rows,
        notes=f"Limit: the fastest 512³ matrix product of all ranks at once ({_gflops(results)} GFLOP/s), divided by "
        f"{flops:,} FLOPs per token (formula “{FORMULA}”: 6 N + 6 L h s). Ratio: median (smallest to largest) of the "
        f"rounds. The loops' losses differ by at most {first:.0e} nats at the first step, {last:.0e} at the last.",
    )


def _gflops(results: dict[tuple[int, int], Measurement]) -> str:
    return ", ".join(f"{result.peak_flops / 1e9:.0f}" for result in results.values())


def main() -> None:
    """Measure every shape in every setting, print the tables, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each contestant that count")
    parser.add_argument("--seconds", type=float, default=0.8, help="aimed-at length of a block")
    parser.add_argument("--only", choices=list(SHAPES), help="one shape")
    parser.add_argument("--dry", action="store_true", help="print, but write no result file")
    arguments = parser.parse_args()

    from parallel.rank_pool import RankPool

    sections = []
    with RankPool(max(processes for processes, _ in SETTINGS)) as pool:
        for shape in [arguments.only] if arguments.only else SHAPES:
            plain, masked = (recipe_of(shape, f"{MASKING}={masks}") for masks in ("false", "true"))
            results = {}
            for processes, threads in SETTINGS:
                arguments_of_rank = (plain, masked, threads, arguments.rounds, arguments.seconds)
                results[processes, threads] = pool.run(processes, measure, *arguments_of_rank)[0]
            sections.append(section_of(shape, results))
    publish("train-step", "Our training step beside a bare loop over transformers", sections, write=not arguments.dry)


if __name__ == "__main__":
    main()
