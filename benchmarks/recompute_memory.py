"""What activation recomputation saves and costs on a model of 135M parameters: bytes kept, peak, seconds a step.

    python benchmarks/recompute_memory.py        [--rounds 3 --dry]

The three settings of `parallelism.recompute` start from the same weights and see the same tokens; they take turns, step
by step, in one process. Everything is on the CPU.
"""

import argparse
from dataclasses import dataclass
from statistics import median

from benchmarks.report import Section, publish
from nanotron_recipes.loading import load_recipe
from nanotron_recipes.recipe import Recipe

MODES = ("none", "selective", "full")

SHAPE = (
    "model.model_config.hidden_size=576",
    "model.model_config.intermediate_size=1536",
    "model.model_config.num_hidden_layers=30",
    "model.model_config.num_attention_heads=9",
    "model.model_config.num_key_value_heads=3",
    "model.model_config.vocab_size=49152",
    "model.model_config.max_position_embeddings=2048",
    "model.init_method.std=0.04",
    "tokenizer.train.vocab_size=49152",
    "tokens.sequence_length=512",
    "tokens.global_batch_size=1",
)
"""SmolLM2-135M's shape over `tiny`; the whole batch is one micro-batch."""

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Measurement:
    """One setting.

    Attributes:
        kept: bytes that autograd keeps between the forward and the backward pass of a micro-batch.
        peak: bytes allocated at most during a step, over weights, gradients and optimizer state.
        seconds: of a step, by round.
        losses: of the first steps, nats per token.
    """

    kept: int
    peak: int
    seconds: list[float]
    losses: list[float]


def recipe_of(mode: str) -> Recipe:
    """The 135M model with one setting."""
    return load_recipe("tiny", [*SHAPE, f"parallelism.recompute={mode}"]).recipe


def measure(rounds: int, threads: int) -> dict[str, Measurement]:
    """Every setting, in a world of this rank alone."""
    import torch
    import torch.distributed as torch_dist

    from benchmarks.kept_tensors import kept_bytes, peak_bytes
    from benchmarks.rounds import take_turns
    from launch.train.engine import TrainingEngine
    from launch.train.rank import silence_known_warnings
    from launch.train.synthetic import synthetic_batch
    from model.build import initialize_weights
    from nanotron_recipes.topology import resolve_topology
    from parallel.process_groups import EngineContext, init_process_group

    silence_known_warnings()
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    init_process_group(device)
    assert torch_dist.get_world_size() == 1
    topology = resolve_topology(recipe_of("none"), 1)
    context = EngineContext(1, 1, 1, device)
    engines = {mode: TrainingEngine(recipe_of(mode), topology, context) for mode in MODES}
    batch = synthetic_batch(recipe_of("none"), topology, 1, 0)
    kept, peak = {}, {}
    losses: dict[str, list[float]] = {mode: [] for mode in MODES}

    def step(mode: str) -> None:
        losses[mode].append(engines[mode].train_step(batch, LEARNING_RATE).loss)

    for mode, engine in engines.items():
        initialize_weights(engine.built)
        step(mode)  # makes what is made once
        arrays = batch.micro_batches[0]
        engine.gradients.begin(1)
        kept[mode] = kept_bytes(
            engine.built,
            engine.built.prepare({key: torch.from_numpy(value) for key, value in vars(arrays).items()}),
        )
        engine.gradients.finish()
        peak[mode] = peak_bytes(lambda mode=mode: step(mode))  # type: ignore[misc]
    seconds = take_turns({mode: lambda mode=mode: step(mode) for mode in MODES}, rounds, 1)  # type: ignore[misc]
    context.destroy()
    return {mode: Measurement(kept[mode], peak[mode], seconds[mode], losses[mode]) for mode in MODES}


def section_of(results: dict[str, Measurement]) -> Section:
    """The table."""
    from benchmarks.rounds import ratios, spread
    from model.arithmetic import num_parameters

    recipe, plain = recipe_of("none"), results["none"]
    rows = [
        (
            mode,
            mib(result.kept),
            f"−{1 - result.kept / plain.kept:.0%}" if mode != "none" else "",
            mib(result.peak),
            mib(plain.peak - result.peak) if mode != "none" else "",
            f"{median(result.seconds):.2f}",
            spread(ratios(result.seconds, plain.seconds)) if mode != "none" else "",
        )
        for mode, result in results.items()
    ]
    apart = max(
        abs(ours - theirs)
        for result in results.values()
        for ours, theirs in zip(result.losses, plain.losses, strict=True)
    )
    logits = (recipe.tokens.global_batch_size or 0) * recipe.tokens.sequence_length
    logits *= recipe.model.architecture.vocab_size * 4
    return Section(
        title=f"{num_parameters(recipe):,} parameters, one micro-batch of {recipe.tokens.global_batch_size} "
        f"sequence of {recipe.tokens.sequence_length} tokens, {recipe.model.dtype}",
        columns=("recompute", "kept, MiB", "", "peak of a step, MiB", "saved, MiB", "s/step", "ratio to none"),
        rows=rows,
        notes="Kept: what autograd holds between forward and backward, each storage once, without parameters and the "
        f"micro-batch's own tensors; the loss (logits: {mib(logits)} MiB a copy) is part of it in every setting. Peak: "
        "largest sum of what the CPU allocator gave out during a step, over weights, gradients and optimizer state. "
        f"Ratio: median (smallest to largest) of the rounds. The losses of {len(plain.losses)} steps differ by at "
        f"most {apart:.0e} nats.",
    )


def mib(size: int) -> str:
    """Mebibytes without decimals."""
    return f"{size / 2**20:,.0f}"


def main() -> None:
    """Measure the three settings, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each setting that count")
    parser.add_argument("--threads", type=int, default=2, help="threads of the process")
    parser.add_argument("--dry", action="store_true", help="print, but write no result file")
    arguments = parser.parse_args()

    from parallel.rank_pool import RankPool

    with RankPool(1) as pool:
        [results] = pool.run(1, measure, arguments.rounds, arguments.threads)
    publish(
        "recompute-memory",
        "What activation recomputation saves and costs",
        [section_of(results)],
        write=not arguments.dry,
    )


if __name__ == "__main__":
    main()
