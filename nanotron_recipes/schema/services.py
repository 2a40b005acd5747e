"""Sections `logging`, `metrics_logging`, `profiler` and `lighteval`: what surrounds the training."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, StringConstraints

from nanotron_recipes.schema.section import NoEffect, NonNegativeInt, PositiveInt, Section, null_means

_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"

VariableName = Annotated[
    str,
    BeforeValidator(lambda value: "(hidden)" if isinstance(value, str) and not re.match(_NAME, value) else value),
    StringConstraints(pattern=_NAME),
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
    """Steps between two printed lines. metrics.jsonl has every step."""

    wandb: bool = False
    """Send the records to wandb as well, under `general.project`; needs the extra `wandb`."""

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


class Lighteval(Section):
    """nanotron's evaluation jobs. Keys of nanotron 0.4 and of the later one."""

    slurm_template: str | None = None
    """Job template."""

    slurm_script_dir: str | None = None
    """Folder for job scripts."""

    checkpoints_path: str | None = None
    """Checkpoints to evaluate."""

    parallelism: dict[str, Any] | None = None
    """Topology of the evaluation."""

    batch_size: PositiveInt | None = None
    """Batch of the evaluation."""

    generation: dict[str, Any] | None = None
    """Sampling of generative tasks."""

    tasks: dict[str, Any] | None = None
    """What to evaluate."""

    logging: dict[str, Any] | None = None
    """Where results go."""

    wandb: dict[str, Any] | None = None
    """wandb of nanotron 0.4."""

    logs_path: str | None = None
    """Folder for logs."""

    local_checkpoint_dir: str | None = None
    """Folder to download checkpoints to."""

    nanotron_path: str | None = None
    """Where nanotron is."""

    output_dir: str | None = None
    """Folder for results."""

    s3_save_path: str | None = None
    """S3 prefix for results."""

    upload_to_wandb: bool = False
    """Send results to wandb."""

    wandb_project: str | None = None
    """wandb's project."""

    wandb_entity: str | None = None
    """wandb's entity."""

    eval_config_override: str | None = None
    """File that replaces the tasks."""

    eval_interval: PositiveInt | None = None
    """Steps between two evaluations."""

    eval_interval_file: str | None = None
    """File that holds the interval."""

    slurm: dict[str, Any] | None = None
    """Resources of the job."""
