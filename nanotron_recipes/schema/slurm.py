"""Section `slurm`: what a job on a cluster asks for, and what happens when it ends before the run does."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from nanotron_recipes.schema.section import NonNegativeInt, PositiveInt, Section, text_like

Word = Annotated[str, text_like(r"\S{1,500}", "text without spaces, of 1 to 500 characters")]
"""What sbatch takes in one piece."""

TimeLimit = Annotated[
    str,
    text_like(
        r"[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2}|[0-9]+(:[0-9]{1,2}){0,2}",
        "a time as sbatch writes it, like 1-12:00:00 (a day and a half), 12:00:00 or 90 (minutes)",
    ),
    BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value),
]
"""sbatch's own forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""


class Slurm(Section):
    """Resources of a job on a Slurm cluster, and how it goes on after an interruption."""

    gpus_per_node: NonNegativeInt = 8
    """GPUs of a node, one rank each; 0: CPU nodes with `general.cpu_ranks_per_node` ranks."""

    min_nodes: PositiveInt | None = None
    """With `parallelism.dp: auto`: the job also starts with fewer nodes than asked for, down to this number, for
    instance after a failure: with as many as are free. At most --nodes. Null: only with all of them."""

    cpus_per_task: PositiveInt | None = None
    """Cores of the node's one task, which starts all its ranks. Null: all of the node."""

    partition: Word | None = None
    """Partition. Null: the cluster's default."""

    qos: Word | None = None
    """Quality of service."""

    time: TimeLimit | None = None
    """Time limit, as sbatch writes it (D-HH:MM:SS, or minutes). Null: the partition's."""

    reservation: Word | None = None
    """Reservation to run in."""

    account: Word | None = None
    """Account to charge."""

    exclude: Word | None = None
    """Nodes to keep off, as sbatch writes them. Nodes on which ranks crash repeatedly are kept off by themselves."""

    signal_seconds: PositiveInt = 300
    """Seconds before the time limit at which the run is told to save and stop; the job then goes back into the queue.
    Slurm may send the signal up to a minute earlier."""

    max_requeues: NonNegativeInt = 10
    """With more failures in a row than this, and no new checkpoint between them, the job is not put back into the queue
    any more. The pause after each crash doubles. A time limit or a preemption is a failure only where no step was saved
    since the start."""

    profile: Word | None = None
    """A cluster profile (aws-p5, infiniband, ethernet, cpu, or the path of a file): environment variables of the ranks,
    and values for keys of this section that the recipe leaves out."""

    prologue: str = ""
    """Shell lines that run on each node before training: module load, source … The node's shell fills ${NAME} in them,
    not section `variables`. What they set holds for what follows, but for shell options (set -e) and the folder; where
    they end the shell, the job fails, or on one of its nodes this start of it."""

    srun_args: list[Word] = Field(default_factory=list)
    """Further arguments of srun, such as a container's."""
