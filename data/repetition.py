"""Whether a run reads a source so often that it learns little new from it."""

from data.plan import DataPlan

MANY_EPOCHS = 4.0
"""Up to about here repeated text is nearly as good as new text (Muennighoff et al. 2023, "Scaling Data-Constrained
Language Models")."""


def repetition_notes(plan: DataPlan) -> list[str]:
    """A line for each source that the run reads more than `MANY_EPOCHS` times over."""
    epochs: dict[str, float] = {}
    for line in plan.coverage():
        epochs[line.source] = max(epochs.get(line.source, 0.0), line.epochs or 0.0)
    return [
        f"{name}: its {plan.sources[name].train.num_tokens:,} training tokens are read {times:.1f} times over in "
        f"{plan.train_steps:,} steps; beyond about {MANY_EPOCHS:g} times, repeated text teaches less and less"
        for name, times in epochs.items()
        if times > MANY_EPOCHS
    ]
