"""What the device can do: peak FLOPs per second for MFU, and peak memory."""

import re
import resource
import socket
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanotron_recipes.machine import usable_cpus

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GpuPeak:
    """Dense peaks of one GPU in FLOP/s, as its maker states them (half of a figure stated "with sparsity")."""

    name: str
    """Regular expression for the name that the driver gives, without the maker's."""
    bfloat16: float
    """Tensor cores, bfloat16 with float32 accumulation. TF32 runs at half of it on every NVIDIA part here."""
    float32: float
    """Without tensor cores."""


# Sources: the makers' data sheets of the parts (NVIDIA H100, H200, HGX B200, A100, A10, A40, L4, L40, L40S, RTX A6000;
# for GeForce the row "FP16 tensor with FP32 accumulate" in the Ampere, Ada and Blackwell papers; AMD Instinct MI300X).
# The first match counts. A part of a GPU (MIG) and a laptop's version of one are other devices and match nothing.
GPU_PEAKS = [
    GpuPeak(r"H100 PCIe", 756e12, 51e12),
    GpuPeak(r"H100 NVL", 835e12, 60e12),
    GpuPeak(r"H100( 80GB HBM3| SXM5.*)?", 989.5e12, 67e12),
    GpuPeak(r"H200 NVL", 835e12, 60e12),
    GpuPeak(r"H200( SXM.*)?", 989.5e12, 67e12),
    GpuPeak(r"H800( SXM.*)?", 989.5e12, 67e12),
    GpuPeak(r"B200", 2250e12, 75e12),
    GpuPeak(r"A100[ -].*", 312e12, 19.5e12),
    GpuPeak(r"A800[ -].*", 312e12, 19.5e12),
    GpuPeak(r"A40", 149.7e12, 37.4e12),
    GpuPeak(r"A10", 125e12, 31.2e12),
    GpuPeak(r"RTX A6000", 154.8e12, 38.7e12),
    GpuPeak(r"L40S", 362.05e12, 91.6e12),
    GpuPeak(r"L40", 181.05e12, 90.5e12),
    GpuPeak(r"L4", 121e12, 30.3e12),
    GpuPeak(r"GeForce RTX 5090", 209.5e12, 104.8e12),
    GpuPeak(r"GeForce RTX 4090", 165.2e12, 82.6e12),
    GpuPeak(r"GeForce RTX 3090", 71e12, 35.6e12),
    GpuPeak(r"Instinct MI300X.*", 1307.4e12, 163.4e12),
]


def gpu_peak_flops(device_name: str, dtype: str, *, tf32: bool = False) -> float | None:
    """Dense peak in FLOP/s of the GPU called `device_name` for matrix products in `dtype` ("bfloat16", "float32").

    `tf32`: float32 products may use TF32 tensor cores. None for a device that the table does not know.
    """
    name = re.sub(r"^(NVIDIA|AMD) ", "", device_name)
    if " MIG " in name or "Laptop" in name:
        return None
    peak = next((peak for peak in GPU_PEAKS if re.fullmatch(peak.name, name)), None)
    if peak is None:
        return None
    if dtype == "bfloat16":
        return peak.bfloat16
    return peak.bfloat16 / 2 if tf32 else peak.float32


def peak_flops(device: "torch.device", dtype: str) -> float | None:
    """Peak in FLOP/s of this rank's device for `dtype`: from the table on a GPU, measured on a CPU.

    On a CPU all ranks call this at the same time, so that each measures its share of the machine. None where unknown.
    """
    import torch

    if device.type == "cpu":
        return measured_cpu_flops(dtype)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return gpu_peak_flops(torch.cuda.get_device_name(device), dtype, tf32=tf32)


def peak_of_world(device: "torch.device", dtype: str) -> float | None:
    """Peak in FLOP/s of all ranks together for `dtype`, a collective; None where it is unknown."""
    import torch
    import torch.distributed as torch_dist

    torch_dist.barrier()  # on the CPU all ranks measure at once, as they will train
    peak = peak_flops(device, dtype)
    if peak is not None and device.type == "cpu":
        peak *= share_of_cpus()
    total = torch.tensor(0.0 if peak is None else peak, dtype=torch.float64, device=device)
    torch_dist.all_reduce(total)
    return float(total) or None


def share_of_cpus() -> float:
    """Below 1 where the ranks of this machine have more threads than it has CPUs: the fastest product of each may have
    had a CPU that the others wait for."""
    import torch
    import torch.distributed as torch_dist

    here = socket.gethostname()
    hosts = [""] * torch_dist.get_world_size()
    torch_dist.all_gather_object(hosts, here)
    return min(1.0, usable_cpus() / (hosts.count(here) * torch.get_num_threads()))


def measured_cpu_flops(dtype: str, seconds: float = 0.3, size: int = 512) -> float:
    """FLOP/s of the fastest of the matrix products of `size` that fit in `seconds`, with this process's threads."""
    import torch

    left = torch.ones(size, size, dtype=getattr(torch, dtype))
    right = torch.ones(size, size, dtype=getattr(torch, dtype))
    out = torch.empty_like(left)
    end = time.perf_counter() + seconds
    fastest = float("inf")
    while True:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        now = time.perf_counter()
        fastest = min(fastest, now - start)
        if now >= end:
            return 2 * size**3 / fastest


def peak_memory_bytes(device: "torch.device") -> int:
    """Largest memory of this process so far, in bytes: allocated on the GPU, or resident for a CPU rank."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
