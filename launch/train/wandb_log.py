"""The run's records on Weights & Biases, where the extra `wandb` is installed."""

from pathlib import Path
from typing import Any

from launch.train.metrics import Event, StepRecord
from launch.train.tensorboard import scalars
from nanotron_recipes.errors import UserError


class Wandb:
    """A callback that sends records to wandb; a run that goes on continues its curves there."""

    def __init__(self, folder: Path, project: str, run_name: str, config: dict[str, Any]) -> None:
        """Start or go on with `run_name` in `project`; wandb's own files go to `folder`.

        Raises UserError when wandb is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise UserError("wandb is not installed: pip install 'nanotron-recipes[wandb]', or leave it out") from error
        self._run = wandb.init(
            project=project, name=run_name, id=run_name, resume="allow", dir=str(folder), config=config
        )

    def on_step(self, record: StepRecord) -> None:
        """Send every number of a step under `train/`."""
        self._run.log({f"train/{name}": value for name, value in scalars(record).items()}, step=record.step)

    def on_event(self, event: Event) -> None:
        """Send validation losses under `validation/`."""
        if event["event"] == "validation":
            losses = {f"validation/{source}": loss for source, loss in event["validation_loss"].items()}
            self._run.log(losses, step=event["step"])

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
