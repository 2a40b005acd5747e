"""The run's records on Weights & Biases, where the extra `wandb` is installed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.train.metrics import Event, StepRecord
from launch.train.outage import Outage
from launch.train.streams import say
from launch.train.tensorboard import scalars
from nanotron_recipes.errors import UserError


class Wandb:
    """A callback that sends records to wandb; a run that goes on continues its curves there.

    What wandb does not take (a full disk, its server or its process gone) is left out.
    """

    def __init__(
        self, folder: Path, project: str, run_name: str, config: dict[str, Any], tell: Callable[[str], None] = say
    ) -> None:
        """Start or go on with `run_name` in `project`; wandb's own files go to `folder`.

        `tell` is given a line when wandb takes nothing any more, and when it does again.
        Raises UserError when wandb is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise UserError("wandb is not installed: pip install 'nanotron-recipes[wandb]', or leave it out") from error
        self._run = wandb.init(
            project=project, name=run_name, id=run_name, resume="allow", dir=str(folder), config=config
        )

        self._outage = Outage("wandb", "training goes on without new points there", "it takes new points again", tell)

    def on_step(self, record: StepRecord) -> None:
        """Send every number of a step under `train/`."""
        self._log({f"train/{name}": value for name, value in scalars(record).items()}, record.step)

    def on_event(self, event: Event) -> None:
        """Send validation losses under `validation/`."""
        if event["event"] == "validation":
            losses = {f"validation/{source}": loss for source, loss in event["validation_loss"].items()}
            self._log(losses, event["step"])

    def close(self) -> None:
        """Send what is left."""
        self._try(self._run.finish)

    def _log(self, values: dict[str, float | None], step: int) -> None:
        self._try(lambda: self._run.log(values, step=step))

    def _try(self, send: Callable[[], object]) -> None:
        try:
            send()
        except Exception as error:  # wandb has kinds of its own, and passes on those of what it is made of
            self._outage.failed(error)
        else:
            self._outage.succeeded()
