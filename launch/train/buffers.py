"""Memory that batches are read into."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data.batch import Allocate


def allocator(device: torch.device) -> Allocate:
    """What makes the arrays of batches for a device: page-locked memory where it is CUDA's, which copies from it while
    the host goes on."""
    return _pinned if device.type == "cuda" else np.empty


def _pinned(shape: tuple[int, ...], dtype: type[np.int64 | np.bool_]) -> npt.NDArray[Any]:
    torch_dtype = torch.bool if dtype is np.bool_ else torch.int64
    return torch.empty(shape, dtype=torch_dtype, pin_memory=True).numpy()
