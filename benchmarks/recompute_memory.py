"""What activation recomputation saves and costs on a model of 135M parameters: bytes kept, peak, seconds a step.

    python benchmarks/recompute_memory.py        [--rounds 5 --dry]

One model is switched between the three settings of `parallelism.recompute`; for their times they take turns, step by
step. The loss and the gradient norm of a step from the same weights are compared. Everything is on the CPU.
"""

import argparse
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from statistics import median

from benchmarks.report import Section, publish
from nanotron_recipes.loading import load_recipe

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

TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class Measurement:
    """One setting.

    Attributes:
        kept: bytes that autograd keeps between the forward and the backward pass of a micro-batch.
        peak: bytes allocated at most during a step, over weights, gradients and optimizer state.
        seconds: CPU time of a step, by round.
        loss: of a step from the initial weights, nats per token.
        grad_norm: of that step.
    """

    kept: int
    peak: int
    seconds: list[float]
    loss: float
    grad_norm: float


def measure(rounds: int, threads: int) -> dict[str, Measurement]:
    """Every setting, in a world of this rank alone."""
    import torch

    from benchmarks.kept_tensors import kept_bytes, peak_bytes
    from benchmarks.rounds import take_turns
    from launch.train.engine import StepResult, TrainingEngine
    from launch.train.synthetic import synthetic_batch
    from model.build import initialize_weights
    from model.llama import DecoderLayer
    from nanotron_recipes.topology import resolve_topology
    from parallel.process_groups import EngineContext, init_process_group

    torch.set_num_threads(threads)
    device = torch.device("cpu")
    init_process_group(device)
    recipe = load_recipe("tiny", SHAPE).recipe
    topology = resolve_topology(recipe, 1)
    context = EngineContext(1, 1, 1, device)
    engine = TrainingEngine(recipe, topology, context)
    layers = [module for module in engine.built.module.modules() if isinstance(module, DecoderLayer)]
    batch = synthetic_batch(recipe, topology, 1, 0)
    arrays = {key: torch.from_numpy(value) for key, value in vars(batch.micro_batches[0]).items()}

    def step(mode: str) -> StepResult:
        for layer in layers:
            layer.recompute = mode
        return engine.train_step(batch, LEARNING_RATE)

    step("none")  # allocates the optimizer's state
    kept, peak, first = {}, {}, {}
    for mode in MODES:
        initialize_weights(engine.built)
        results: list[StepResult] = []
        peak[mode] = peak_bytes(lambda mode=mode, results=results: results.append(step(mode)))  # type: ignore[misc]
        first[mode] = results[0]
        engine.gradients.begin(1)
        kept[mode] = kept_bytes(engine.built, engine.built.prepare(arrays))
        engine.gradients.finish()
    seconds = take_turns({mode: partial(step, mode) for mode in MODES}, rounds, 1, time.process_time)
    context.destroy()
    return {
        mode: Measurement(kept[mode], peak[mode], seconds[mode], first[mode].loss, first[mode].grad_norm)
        for mode in MODES
    }


def section_of(results: dict[str, Measurement]) -> Section:
    """The table."""
    from benchmarks.rounds import ratios, spread
    from model.arithmetic import num_parameters

    recipe, plain = load_recipe("tiny", SHAPE).recipe, results["none"]
    rows: list[tuple[str, ...]] = [
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
    loss = max(abs(result.loss - plain.loss) for result in results.values())
    norm = max(abs(result.grad_norm / plain.grad_norm - 1) for result in results.values())
    logits = (recipe.tokens.global_batch_size or 0) * recipe.tokens.sequence_length
    logits *= recipe.model.architecture.vocab_size * 4
    return Section(
        title=f"{num_parameters(recipe):,} parameters, one micro-batch of {recipe.tokens.global_batch_size} "
        f"sequence of {recipe.tokens.sequence_length} tokens, {recipe.model.dtype}",
        columns=("recompute", "kept, MiB", "", "peak of a step, MiB", "saved, MiB", "CPU s/step", "ratio to none"),
        rows=rows,
        notes="Kept: what autograd holds between forward and backward, each storage once, without parameters and the "
        f"micro-batch's own tensors; the loss (logits: {mib(logits)} MiB a copy) is part of it in every setting. Peak: "
        "largest sum of what the CPU allocator gave out during a step, over weights, gradients and optimizer state. "
        "Ratio: median (smallest to largest) of the rounds. In a step from the same weights the losses differ by at "
        f"most {loss:.0e} nats, the gradient norms by {norm:.0e} relative.",
    )


def mib(size: int) -> str:
    """Mebibytes without decimals."""
    return f"{size / 2**20:,.0f}"


def main() -> None:
    """Measure the three settings, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="steps of each setting that count")
    parser.add_argument("--threads", type=int, default=1, help="threads of the process")
    parser.add_argument("--dry", action="store_true", help="print, but write no result file")
    arguments = parser.parse_args()

    from parallel.rank_pool import RankPool

    with RankPool(1, TIMEOUT) as pool:
        [results] = pool.run(1, measure, arguments.rounds, arguments.threads)
    publish(
        "recompute-memory",
        "What activation recomputation saves and costs",
        [section_of(results)],
        write=not arguments.dry,
    )


if __name__ == "__main__":
    main()
