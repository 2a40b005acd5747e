"""Section `guards`: what a run does about numbers that are wrong and ranks that stand still."""

from __future__ import annotations

from nanotron_recipes.schema.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class Guards(Section):
    """Guards against wasted weeks. New here; none of them changes a step that goes well."""

    max_skipped_steps: PositiveInt = 10
    """So many steps in a row whose loss or gradient norm is not finite end the run, exit 1. A single one is only
    skipped: the weights and the optimizer stay as they are, the data moves on."""

    step_timeout_seconds: PositiveFloat | None = 480.0
    """A step, or the validation on one source, that takes longer than this ends the run, exit 1, after every rank has
    written its stacks to its log. At 600 a collective gives up by itself, without stacks. Null: no such limit."""

    loss_spike_window: NonNegativeInt = 64
    """The last steps, of the same stage alone, that a loss is compared with once there are so many: a spike is
    recorded. 0: never."""

    loss_spike_threshold: PositiveFloat = 8.0
    """A loss is a spike above median + threshold · max(1.4826 · MAD, 0.5 % of the median) over the last
    loss_spike_window steps. MAD is the median absolute deviation; 1.4826 · MAD estimates a standard deviation."""

    rewind_after_spike: bool = False
    """After a loss spike go back to a checkpoint from before it and train on without the batches around it (PaLM,
    arXiv:2204.02311, section 5.1). They are appended to data_skipped_ranges of the run's recipe."""

    rewind_skip_before: NonNegativeInt = 100
    """Batches that are skipped before the spike's. The run goes back to the newest checkpoint that has read none of
    them; where there is none, to the newest from before the spike, and skips only what was read after that."""

    rewind_skip_after: PositiveInt = 100
    """Batches that are skipped from the spike's own on."""

    max_rewinds: NonNegativeInt = 10
    """How often a run goes back; later spikes are only recorded."""
