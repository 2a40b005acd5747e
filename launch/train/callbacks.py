"""Who is told what happens in a run, on its first rank."""

from launch.evaluate.evaluators import LocalEvaluator, SlurmEvaluator
from launch.train.evaluations import Evaluations
from launch.train.loop import Launch
from launch.train.metrics import Callback, MetricsWriter
from launch.train.signals import StopRequest
from launch.train.step_line import StepLine
from launch.train.tensorboard import TensorBoard
from launch.train.wandb_log import Wandb
from launch.train.webhook import SpeedAlarm, Webhook


def make_callbacks(launch: Launch, stop: StopRequest, *, is_job: bool) -> list[Callback]:
    """What the recipe asks for; the records first, so that they are closed last.

    Args:
        stop: whether somebody has asked the run to stop.
        is_job: whether the run is a Slurm job, and can submit others.
    """
    recipe, folder = launch.recipe, launch.folder
    line = StepLine(recipe.tokens.train_steps, every_steps=recipe.logging.iteration_step_info_interval)
    records = MetricsWriter(folder.metrics_file, line.print)
    callbacks: list[Callback] = [records, line, TensorBoard(folder.tensorboard, launch.first_step, line.print)]
    if recipe.logging.webhook_variable is not None:
        callbacks.append(SpeedAlarm(Webhook.of(recipe, folder.name, line.print), recipe))
    if recipe.lighteval is not None:
        logs = folder.logs / "evaluations"
        callbacks.append(
            Evaluations(
                SlurmEvaluator(folder.path, logs, recipe) if is_job else LocalEvaluator(folder.path, logs),
                recipe.lighteval.eval_interval,
                launch.first_step,
                records.on_event,
                lambda: stop.is_set,
                line.print,
                longest_end_seconds=recipe.lighteval.longest_wait_seconds,
            )
        )
    if recipe.logging.wandb:
        config = recipe.model_dump(mode="json", by_alias=True)
        callbacks.append(
            Wandb(folder.path, recipe.general.project, folder.name, folder.header().run, config, line.print)
        )
    return callbacks
