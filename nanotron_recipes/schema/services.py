"""Sections `logging`, `metrics_logging`, `profiler` and `lighteval`: what surrounds the training."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from nanotron_recipes.schema.section import (
    VARIABLE,
    VARIABLE_IN_WORDS,
    NoEffect,
    NonNegativeInt,
    PositiveInt,
    Section,
    null_means,
    text_like,
)
from nanotron_recipes.schema.slurm import TimeLimit, Word

VariableName = Annotated[
    str,
    text_like(VARIABLE, VARIABLE_IN_WORDS),
    BeforeValidator(
        lambda value: "(hidden)" if isinstance(value, str) and not re.fullmatch(VARIABLE, value) else value
    ),
]
"""Of an environment variable. What is none may be the secret itself: no message shows it."""

LogLevel = Literal["debug", "info", "warning", "error", "critical", "passive"]


class Logging(Section):
    """What a run says while it trains."""

    log_level: Annotated[LogLevel, null_means("info")] = "info"
    """Least severity that the first rank logs."""

    log_level_replica: Annotated[LogLevel, null_means("info")] = "info"
    """Least severity that the other ranks log."""

    iteration_step_info_interval: Annotated[PositiveInt, null_means(1)] = 1
    """Fewest steps between two lines in a log, which are 5 s of training apart as well. A terminal shows every step in
    place, and metrics.jsonl has every step."""

    wandb: bool = False
    """Send the records to wandb as well, under `general.project`; needs the extra `wandb` and `wandb login`, or
    WANDB_MODE=offline. wandb keeps the first points of steps that are trained again."""

    webhook_variable: VariableName | None = None
    """Name of an environment variable of the first rank that holds the URL to which a failure, or a sustained drop of
    the speed, is posted as JSON. The URL, which is a secret, stands in no recipe. Null: nothing is posted."""


class MetricsLogging(Section):
    """nanotron's per-layer statistics."""

    log_level: int = 0
    """How much to log."""

    log_detail_interval: PositiveInt = 1
    """Steps between two detailed records."""


class Profiler(Section):
    """torch.profiler over a few steps, one trace a rank."""

    profiler_export_path: str | None = None
    """Folder for the traces, inside the run's folder where it is relative. Null: no profiling."""

    skip_first: NonNegativeInt = 3
    """Steps to leave out at the start."""

    wait: NonNegativeInt = 1
    """Idle steps before each recording."""

    warmup: NonNegativeInt = 1
    """Steps that are traced and thrown away."""

    active: PositiveInt = 1
    """Steps that are recorded."""

    repeat: NonNegativeInt = 1
    """Recordings; 0 means until the run ends."""

    record_shapes: bool = True
    """Record the shapes of operators' inputs."""

    profile_memory: bool = True
    """Record allocations."""

    with_stack: bool = True
    """Record source lines."""

    export_chrome_trace: Annotated[
        bool, NoEffect("a trace is always in Chrome's form, which TensorBoard reads too")
    ] = False
    """Write a Chrome trace rather than TensorBoard's form."""


class LightevalTasks(Section):
    """nanotron's choice of benchmarks."""

    tasks: str | None = None
    """Benchmarks for lighteval, as it writes them (`arc:challenge|0,hellaswag|0`): in a Slurm job they are run on the
    evaluated checkpoint, where `make eval-env` has installed lighteval. Null: the offline tasks only."""

    custom_tasks: Annotated[str | None, NoEffect("lighteval's own tasks only")] = None
    """File of further tasks."""

    max_samples: PositiveInt | None = None
    """Samples of each benchmark, to try things out. Null: all."""

    num_fewshot_seeds: Annotated[int | None, NoEffect("lighteval's default")] = None
    """Repetitions with other examples in the prompt."""

    dataset_loading_processes: Annotated[int | None, NoEffect("lighteval's default")] = 8
    """Processes that load a data set."""

    multichoice_continuations_start_space: Annotated[bool | None, NoEffect("lighteval's default")] = None
    """Begin continuations with a space."""

    no_multichoice_continuations_start_space: Annotated[bool | None, NoEffect("lighteval's default")] = None
    """Begin continuations without a space."""


class LightevalSlurm(Section):
    """Resources of an evaluation's own job, where the run is a Slurm job; what is null is taken from `slurm`."""

    gpus_per_node: NonNegativeInt = 1
    """GPUs; 0: the evaluation computes on CPUs, as it does where the run's nodes have no GPUs."""

    cpus_per_task: PositiveInt | None = None
    """Cores. Null: Slurm's default."""

    partition: Word | None = None
    """Partition. Null: that of `slurm`."""

    qos: Word | None = None
    """Quality of service."""

    time: TimeLimit = "02:00:00"
    """Time limit, as sbatch writes it."""

    reservation: Word | None = None
    """Reservation to run in."""

    hf_cache: str | None = None
    """Folder where lighteval keeps the data sets of its benchmarks (HF_HOME). Null: the user's own."""


OfflineTask = Literal["loss", "arithmetic"]
OFFLINE_TASKS: tuple[OfflineTask, ...] = ("loss", "arithmetic")


class Lighteval(Section):
    """Evaluation of checkpoints as they appear, each in a process or job of its own. Keys of nanotron 0.4 and of the
    later one."""

    eval_interval: PositiveInt | None = None
    """Steps between two evaluations: of the checkpoints that are saved, the first from each multiple of this on is
    evaluated. Null: every one."""

    offline_tasks: list[OfflineTask] = Field(default_factory=lambda: list(OFFLINE_TASKS))
    """What is measured without any network: `loss`, nats per token on what is held out of each source, and
    `arithmetic`, held-out sums that the model has to complete, where the recipe trains on generated ones."""

    batch_size: PositiveInt | None = None
    """Sequences that are evaluated at a time; of sums, which are short, 25 times as many. Null: 8."""

    longest_wait_seconds: PositiveInt = 60
    """How long a launch that has trained all its steps waits for an evaluation that is going on."""

    tasks: LightevalTasks | None = None
    """Benchmarks."""

    slurm: LightevalSlurm = LightevalSlurm()
    """Resources of the job."""

    slurm_template: Annotated[str | None, NoEffect("there is one template")] = None
    """Job template."""

    slurm_script_dir: Annotated[str | None, NoEffect("a job's script lies beside its log")] = None
    """Folder for job scripts."""

    checkpoints_path: Annotated[str | None, NoEffect("the run's own are evaluated")] = None
    """Checkpoints to evaluate."""

    parallelism: Annotated[dict[str, Any] | None, NoEffect("an evaluation runs on one device")] = None
    """Topology of the evaluation."""

    generation: Annotated[dict[str, Any] | None, NoEffect("answers are greedy")] = None
    """Sampling of generative tasks."""

    logging: Annotated[dict[str, Any] | None, NoEffect("results go to metrics.jsonl and TensorBoard")] = None
    """Where results go."""

    wandb: Annotated[dict[str, Any] | None, NoEffect("results go to metrics.jsonl and TensorBoard")] = None
    """wandb of nanotron 0.4."""

    logs_path: Annotated[str | None, NoEffect("logs lie in the run's folder")] = None
    """Folder for logs."""

    local_checkpoint_dir: Annotated[str | None, NoEffect("checkpoints are evaluated where they lie")] = None
    """Folder to download checkpoints to."""

    nanotron_path: Annotated[str | None, NoEffect("an evaluation runs the code of its run")] = None
    """Where nanotron is."""

    output_dir: Annotated[str | None, NoEffect("results lie in the run's folder")] = None
    """Folder for results."""

    s3_save_path: Annotated[str | None, NoEffect("results lie in the run's folder")] = None
    """S3 prefix for results."""

    upload_to_wandb: Annotated[bool, NoEffect("results go to metrics.jsonl and TensorBoard")] = False
    """Send results to wandb."""

    wandb_project: Annotated[str | None, NoEffect("results go to metrics.jsonl and TensorBoard")] = None
    """wandb's project."""

    wandb_entity: Annotated[str | None, NoEffect("results go to metrics.jsonl and TensorBoard")] = None
    """wandb's entity."""

    eval_config_override: Annotated[str | None, NoEffect("tasks stand in the recipe")] = None
    """File that replaces the tasks."""

    eval_interval_file: Annotated[str | None, NoEffect("the interval stands in the recipe")] = None
    """File that holds the interval."""
