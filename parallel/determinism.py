"""The same bits on every run on a GPU: only kernels that add in a fixed order."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nanotron_recipes.errors import UserError
from nanotron_recipes.machine import CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_VARIABLE


@contextmanager
def deterministic_kernels(wanted: bool, device: torch.device) -> Iterator[None]:
    """While the body runs, torch takes deterministic kernels alone; without `wanted` nothing changes.

    An operation that has no such kernel raises RuntimeError. Of torch's attention kernels cuDNN's is left out then, and
    the backward passes of the others add in a fixed order.

    Raises:
        UserError: on CUDA, this process was started without the variable that cuBLAS needs.
    """
    if not wanted:
        yield
        return
    if device.type == "cuda" and os.environ.get(CUBLAS_WORKSPACE_VARIABLE) not in (CUBLAS_WORKSPACE, ":16:8"):
        raise UserError(
            f"general.deterministic: true: cuBLAS gives the same bits only where ranks are started with "
            f"{CUBLAS_WORKSPACE_VARIABLE}={CUBLAS_WORKSPACE}, as our launcher does"
        )
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        _, cudnn.deterministic, cudnn.benchmark = before
