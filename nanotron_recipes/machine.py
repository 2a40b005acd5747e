"""What this process may use of the machine it runs on."""

from __future__ import annotations

import os

from nanotron_recipes.errors import UserError

MAX_RANKS_PER_CPU = 8
"""More processes than this on a CPU only wait for each other, and for memory."""

CUBLAS_WORKSPACE_VARIABLE, CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""What a process is started with so that cuBLAS gives the same bits on every run; `:16:8` does too, more slowly."""

CONNECTIONS_VARIABLE, CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS", "1"
"""What a process is started with so that the kernels of communication and of matrix products begin in the order they
were queued in, as nanotron's asynchronous tensor-parallel layers need."""

GPUS_VARIABLE = "CUDA_VISIBLE_DEVICES"
"""The GPUs that a process may use, where it is set: their numbers or ids."""


def usable_cpus() -> int:
    """Return the number of CPUs that this process may run on (a container or taskset may leave it fewer)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_local_ranks(num_ranks: int) -> None:
    """Raise UserError for more ranks than this machine's CPUs can bear."""
    cpus = usable_cpus()
    if num_ranks > MAX_RANKS_PER_CPU * cpus:
        raise UserError(
            f"parallelism: dp × pp × tp is {num_ranks:,} ranks; expected at most {MAX_RANKS_PER_CPU * cpus} on this "
            f"machine, {MAX_RANKS_PER_CPU} for each of its CPUs"
        )
