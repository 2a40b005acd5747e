"""The run's records on Weights & Biases, where the extra `wandb` is installed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.train.metrics import Event, StepRecord
from launch.train.outage import Outage
from launch.train.streams import describe, say
from launch.train.tensorboard import scalars
from nanotron_recipes.errors import UserError


def check_wandb() -> None:
    """Raise UserError where wandb is not installed, or would be told no account to send records to.

    Its server is not asked: an outage is no mistake.
    """
    wandb = _import_wandb()
    try:
        wandb.login(verify=False)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        raise _not_logged_in(error) from error


class Wandb:
    """A callback that sends records to wandb; a run that goes on continues its curves there.

    What wandb does not take (a full disk, its server or its process gone) is left out.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        run_name: str,
        run_id: str,
        config: dict[str, Any],
        tell: Callable[[str], None] = say,
    ) -> None:
        """Start or go on with the run `run_id` in `project`, shown as `run_name`; wandb's own files go to `folder`.

        `tell` is given a line when wandb takes nothing (any more), and when it does again.
        Raises UserError when wandb is not installed or has no account.
        """
        self._outage = Outage("wandb", "training goes on without new points there", "it takes new points again", tell)
        self._run: Any = None
        wandb = _import_wandb()
        try:
            self._run = wandb.init(
                project=project, name=run_name, id=run_id, resume="allow", dir=str(folder), config=config
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise _not_logged_in(error) from error
        except Exception as error:
            self._outage.failed(error)

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
        if self._run is not None:
            self._try(self._run.finish)

    def _log(self, values: dict[str, float | None], step: int) -> None:
        if self._run is not None:
            self._try(lambda: self._run.log(values, step=step))

    def _try(self, send: Callable[[], object]) -> None:
        try:
            send()
        except Exception as error:  # wandb has kinds of its own, and passes on those of what it is made of
            self._outage.failed(error)
        else:
            self._outage.succeeded()


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "logging.wandb: true: wandb is not installed: pip install 'nanotron-recipes[wandb]', or leave it out"
        ) from error
    return wandb


def _not_logged_in(error: Exception) -> UserError:
    return UserError(f"logging.wandb: true: {describe(error).rstrip('.')}; or set WANDB_MODE=offline, or leave it out")
