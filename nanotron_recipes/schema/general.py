"""Section `general`: what the run is called and how its randomness starts."""

from __future__ import annotations

from typing import Annotated

from nanotron_recipes.schema.section import NANOTRON_SEED, NoEffect, NonNegativeInt, PositiveInt, Section, null_means


class General(Section):
    """The run as a whole."""

    project: str = "nanotron-recipes"
    """Name that groups runs: the project that wandb files them under."""

    run: Annotated[str | None, NoEffect("a run is named by --run, else by the recipe's name and a number")] = None
    """nanotron's name for the run."""

    seed: Annotated[NonNegativeInt, null_means(NANOTRON_SEED)] = NANOTRON_SEED
    """Seed of the initial weights: each is drawn from this number and its parameter's global name, whatever the
    topology. Change it to repeat a run with another draw."""

    step: Annotated[int | None, NoEffect("the step is read from the checkpoint")] = None
    """nanotron's record of the step reached."""

    consumed_train_samples: Annotated[int | None, NoEffect("it follows from the step and the global batch")] = None
    """nanotron's record of the sequences read."""

    benchmark_csv_path: Annotated[str | None, NoEffect("every run records its speed in metrics.jsonl")] = None
    """nanotron's file for benchmark results."""

    ignore_sanity_checks: Annotated[bool, NoEffect("checks that cost time have settings of their own")] = True
    """nanotron's switch for its comparison of replicas during training."""

    deterministic: bool = False
    """Take only kernels that add in a fixed order: on GPUs of one kind and at one topology every run then has the same
    bits, at some cost in speed. On a CPU every run with one thread a rank has them in any case."""

    purpose: str = ""
    """One line that says what the recipe is for; `list` shows it."""

    cpu_ranks_per_node: PositiveInt = 1
    """Ranks that a node without GPUs starts. With 1 its cores are shared among the ranks, also where options start
    several; with more each rank has one thread. Raise it to the number of cores for models of up to a few million
    parameters, where a process per core beats a process with many threads."""

    replica_check_interval: NonNegativeInt = 0
    """Steps between two comparisons of every replicated or tied parameter, bit by bit, across its ranks; a difference
    ends the run, exit 1, naming parameter and ranks. 0: never."""
