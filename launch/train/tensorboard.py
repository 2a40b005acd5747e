"""The run's records as TensorBoard curves."""

import dataclasses
from pathlib import Path

from launch.train.metrics import Event, StepRecord


class TensorBoard:
    """A callback that writes event files, read with `tensorboard --logdir`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Write to `folder`; curves of an earlier start are cut from `first_step` on, which is trained again."""
        self._folder = folder
        self._open(first_step)

    def _open(self, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        purge = first_step if first_step > 1 else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge, flush_secs=10)

    def on_step(self, record: StepRecord) -> None:
        """Write every number of a step under `train/`."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(f"train/{name}", value, record.step)

    def on_event(self, event: Event) -> None:
        """Write validation losses under `validation/`; where the run goes back, cut the curves."""
        if event["event"] == "rewind" and event["to"] is not None:
            self._writer.close()
            self._open(event["to"] + 1)
        elif event["event"] == "validation":
            for source, loss in event["validation_loss"].items():
                if loss is not None:
                    self._writer.add_scalar(f"validation/{source}", loss, event["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def scalars(record: StepRecord) -> dict[str, float]:
    """The numbers of a step that make curves, by name."""
    values = dataclasses.asdict(record)
    return {name: float(value) for name, value in values.items() if name != "step" and isinstance(value, int | float)}
