"""The tables of learning.py: figures of every model, gains with their errors, and what had to be reached."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from measured import Section

from posttraining.evaluate.results import Results
from posttraining.evaluate.scoring import Estimate, Kind, by_problem, estimate, gain
from posttraining.tasks import arithmetic

PLAIN = {"greedy": "plain-greedy", "sampled": "plain-sampled"}
"""The base's own form of the same problems."""

STEPS = (
    ("SFT over the base, chat", "base", "sft"),
    ("SFT over the base, its own plain form", "base plain", "sft"),
    ("APO over SFT", "sft", "apo"),
    ("DPO over SFT", "sft", "dpo"),
    ("APO over DPO", "dpo", "apo"),
    ("GRPO over APO", "apo", "grpo"),
    ("GRPO without penalty over APO", "apo", "grpo-no-penalty"),
    ("the penalty alone", "grpo-no-penalty", "grpo"),
    ("merge over GRPO", "grpo", "merge"),
    ("merge over SFT", "sft", "merge"),
)


@dataclass(frozen=True)
class Chain:
    """What one pretraining seed came to."""

    seed: int
    results: Results
    margins: dict[str, dict[str, Any]]
    """apo and dpo → margins.json of their stage."""

    def values(self, model: str, task: str, kind: Kind) -> list[float]:
        """One value a problem, in their order."""
        if model == "base plain":
            model, task = "base", PLAIN[task]
        return by_problem(self.results.scores(model, task), kind)


def tables(chains: Sequence[Chain], problems: int, problem_seed: int) -> list[Section]:
    """Every table, from what had to be reached down to single seeds."""
    sections = [_targets(chains), _gains("Gains, pooled over the seeds", chains)]
    sections += [_margins(chains), _two_digits(chains, problems, problem_seed)]
    for chain in chains:
        sections += [_figures(chain), _gains(f"Seed {chain.seed}: gains", [chain])]
    return sections


def pooled(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over seeds, with the error that follows from those of the seeds: sampling of problems and answers."""
    count = len(estimates)
    return Estimate(
        sum(one.mean for one in estimates) / count, math.sqrt(sum(one.error**2 for one in estimates)) / count
    )


def rise(chains: Sequence[Chain], before: str, after: str, task: str, kind: Kind) -> Estimate:
    """By how much `after` exceeds `before` on the same problems, over these seeds."""
    return pooled([gain(one.values(before, task, kind), one.values(after, task, kind)) for one in chains])


def _figures(chain: Chain) -> Section:
    rows = []
    for model in ("base", "base plain", *list(chain.results.summaries)[1:]):
        cells = [model]
        kinds: tuple[tuple[str, Kind, int], ...] = (
            ("greedy", "right", 3),
            ("sampled", "right", 3),
            ("sampled", "well_formed", 3),
            ("greedy", "tokens", 1),
            ("sampled", "tokens", 1),
        )
        cells += [_shown(estimate(chain.values(model, task, kind)), digits) for task, kind, digits in kinds]
        rows.append(tuple(cells))
    n = len(chain.values("sft", "greedy", "right"))
    columns = ("model", "greedy accuracy", "sampled accuracy", "format", "tokens, greedy", "tokens, sampled")
    return Section(f"Seed {chain.seed}: {n} held-out problems", columns, rows)


def _gains(title: str, chains: Sequence[Chain]) -> Section:
    rows = []
    for name, before, after in STEPS:
        greedy, sampled = (rise(chains, before, after, task, "right") for task in ("greedy", "sampled"))
        form = rise(chains, before, after, "sampled", "well_formed")
        length = shortening(chains, before, after)
        shown = (_signed(greedy), _signed(sampled), _signed(form), f"{length.mean:+.1%} ± {length.error:.1%}")
        rows.append((name, *shown))
    notes = (
        "Differences on the same problems; the error is that of the paired difference"
        + (", pooled over the seeds. " if len(chains) > 1 else ". ")
        + "Sampled: temperature 1, nothing cut. Length: tokens of a sampled answer."
    )
    return Section(title, ("step", "greedy accuracy", "sampled accuracy", "format", "length"), rows, notes)


def shortening(chains: Sequence[Chain], before: str, after: str) -> Estimate:
    """The relative change of the mean length of sampled answers (negative: shorter).

    Its error is by the delta method: that of (after - ratio · before) over the mean of before.
    """
    changes = []
    for chain in chains:
        old, new = (chain.values(model, "sampled", "tokens") for model in (before, after))
        ratio, mean = sum(new) / sum(old), sum(old) / len(old)
        rest = estimate([(y - ratio * x) / mean for x, y in zip(old, new, strict=True)])
        changes.append(Estimate(ratio - 1, rest.error))
    return pooled(changes)


def _margins(chains: Sequence[Chain]) -> Section:
    rows = []
    for chain in chains:
        for name, found in chain.margins.items():
            before, after, rose = (Estimate(**found[key]) for key in ("before", "after", "gain"))
            ranked = f"{found['ranked_before']:.3f} → {found['ranked_after']:.3f}"
            cells = (_shown(before), _shown(after), f"{_signed(rose)} ({rose.mean / rose.error:.1f} SE)", ranked)
            rows.append((str(chain.seed), name, str(found["pairs"]), *cells))
    columns = ("seed", "loss", "held-out pairs", "margin before", "after", "gain", "ranked right")
    notes = (
        "Margin: log p(chosen) - log p(rejected) in nats. Both losses see the same pairs with the same settings. At "
        "their start the gradients of apo_zero and DPO differ by a factor of two alone (β/4 and β/2 on either answer), "
        "which Adam takes out; at this learning rate training stays near it, and the two can hardly differ."
    )
    return Section("Preference margins", columns, rows, notes)


def _two_digits(chains: Sequence[Chain], problems: int, problem_seed: int) -> Section:
    drawn = arithmetic.problems(problem_seed, problems, "held_out")
    kept = [number for number, problem in enumerate(drawn) if max(problem.left, problem.right) < 100]

    def part(chain: Chain, model: str, task: str) -> list[float]:
        values = chain.values(model, task, "right")
        return [values[number] for number in kept]

    rows = []
    for model in ("base plain", "sft", "grpo", "merge"):
        cells = [
            _shown(pooled([estimate(part(chain, model, task)) for chain in chains])) for task in ("greedy", "sampled")
        ]
        rows.append((model, *cells))
    notes = f"The {len(kept)} problems whose operands have two digits, the only ones that pretraining taught."
    return Section("Two-digit problems, pooled", ("model", "greedy accuracy", "sampled accuracy"), rows, notes)


def _targets(chains: Sequence[Chain]) -> Section:
    def errors(value: Estimate) -> float:
        return value.mean / value.error if value.error else math.copysign(math.inf, value.mean) if value.mean else 0.0

    rows: list[tuple[str, ...]] = []

    def row(what: str, wanted: str, value: Estimate, shown: str, reached: Callable[[Estimate], bool]) -> None:
        rows.append((what, wanted, shown, "yes" if reached(value) else "no"))

    def at_least(what: str, least: float, value: Estimate) -> None:
        shown = f"{_signed(value)} ({errors(value):.1f} SE)"
        row(what, f"rises by ≥ {least:g} SE", value, shown, lambda one: errors(one) >= least)

    def not_lower(what: str, value: Estimate) -> None:
        shown = f"{_signed(value)} ({errors(value):+.1f} SE)"
        row(what, "not lower by more than 1 SE", value, shown, lambda one: errors(one) >= -1)

    for before in ("base", "base plain"):
        for task in ("greedy", "sampled"):
            at_least(f"SFT over {before}: {task} accuracy", 5, rise(chains, before, "sft", task, "right"))
    at_least("SFT over base: format", 5, rise(chains, "base", "sft", "sampled", "well_formed"))
    at_least("APO: margin of held-out pairs", 3, pooled([Estimate(**one.margins["apo"]["gain"]) for one in chains]))
    for after, before in (("apo", "sft"), ("grpo", "apo")):
        not_lower(f"{after.upper()}: greedy accuracy", rise(chains, before, after, "greedy", "right"))
        if after == "apo":
            not_lower("APO: sampled accuracy", rise(chains, before, after, "sampled", "right"))
    at_least("GRPO: sampled accuracy", 2, rise(chains, "apo", "grpo", "sampled", "right"))
    length = shortening(chains, "apo", "grpo")
    row(
        "GRPO: length",
        "≥ 20 % shorter",
        length,
        f"{length.mean:+.1%} ± {length.error:.1%}",
        lambda one: one.mean <= -0.2,
    )
    notes = (
        "Settings were chosen after looking at held-out figures of another draw of problems (two-digit problems are "
        "few, so many are in both draws): SFT's batch and rate after SFT of all these bases, what comes later "
        "(GRPO's penalty zone and steps) after chains from the first base alone; APO's learning rate was known before."
    )
    return Section("What had to be reached, pooled over the seeds", ("what", "wanted", "found", "reached"), rows, notes)


def _shown(value: Estimate, digits: int = 3) -> str:
    return f"{value.mean:.{digits}f} ± {value.error:.{digits}f}"


def _signed(value: Estimate) -> str:
    return f"{value.mean:+.3f} ± {value.error:.3f}"
