"""Whether a run reads a source so often that it learns little new from it."""

from collections.abc import Iterable

from data.coverage import Coverage
from data.plan import DataPlan

MANY_EPOCHS = 4.0
"""Up to about here repeated text is nearly as good as new text (Muennighoff et al. 2023, "Scaling Data-Constrained
Language Models")."""


def epochs_of(lines: Iterable[Coverage]) -> dict[str, float | None]:
    """By source, how often all of it has been read at the run's end; None where its size is not known."""
    return {line.source: line.epochs for line in lines}


def repetition_notes(plan: DataPlan) -> list[str]:
    """A line for each source that the run reads more than `MANY_EPOCHS` times over."""
    return [
        f"{name}: its {plan.sources[name].train.num_tokens:,} training tokens are read {times:.1f} times over in "
        f"{plan.train_steps:,} steps; beyond about {MANY_EPOCHS:g} times, repeated text teaches less and less"
        for name, times in epochs_of(plan.coverage()).items()
        if times is not None and times > MANY_EPOCHS
    ]
