"""Sections `logging`, `metrics_logging`, `profiler`, `lighteval` and `slurm`: what surrounds the training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from nanotron_recipes.schema.section import NonNegativeInt, PositiveInt, Section, null_means

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


class MetricsLogging(Section):
    """nanotron's per-layer statistics."""

    log_level: int = 0
    """How much to log."""

    log_detail_interval: PositiveInt = 1
    """Steps between two detailed records."""


class Profiler(Section):
    """torch.profiler over a few steps of the first rank."""

    profiler_export_path: str | None = None
    """Folder for the trace. Null: no profiling."""

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

    export_chrome_trace: bool = False
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


class Slurm(Section):
    """Resources of a job on a Slurm cluster."""

    gpus_per_node: NonNegativeInt = 8
    """GPUs of a node, one rank each; 0: CPU nodes with `general.cpu_ranks_per_node` ranks."""

    cpus_per_task: PositiveInt | None = None
    """Cores of the node's one task, which starts all its ranks. Null: the cluster's default."""

    partition: str | None = None
    """Partition. Null: the cluster's default."""

    qos: str | None = None
    """Quality of service."""

    time: str | None = None
    """Time limit, as sbatch writes it (D-HH:MM:SS)."""

    reservation: str | None = None
    """Reservation to run in."""

    account: str | None = None
    """Account to charge."""

    exclude: str | None = None
    """Nodes to keep off, as sbatch writes them."""

    signal_seconds: PositiveInt = 300
    """Seconds before the time limit at which the run is told to save and stop."""

    max_requeues: NonNegativeInt = 10
    """How often the job may be put back into the queue."""

    profile: str | None = None
    """Name of a cluster profile whose values stand where the recipe has none."""

    prologue: str = ""
    """Shell lines that run on each node before training: module load, source …"""

    srun_args: list[str] = Field(default_factory=list)
    """Further arguments of srun, such as a container's."""
