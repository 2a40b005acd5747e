import itertools

import pytest
import torch

from launch.train.hardware import gpu_peak_flops, measured_cpu_flops, peak_flops, peak_memory_bytes, share_of_cpus
from nanotron_recipes.machine import usable_cpus
from parallel.process_groups import init_process_group
from parallel.rank_pool import RankPool


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989.5e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L40S", 362.05e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
    ],
)
def test_known_gpus_are_found_by_the_drivers_name(name: str, bfloat16: float, float32: float) -> None:
    assert gpu_peak_flops(name, "bfloat16") == bfloat16
    assert gpu_peak_flops(name, "float32") == float32
    assert gpu_peak_flops(name, "float32", tf32=True) == bfloat16 / 2


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Tesla T4",
        "",
    ],
)
def test_the_peak_of_an_unknown_gpu_is_not_guessed(name: str) -> None:
    assert gpu_peak_flops(name, "bfloat16") is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpus_peak_is_measured(dtype: str) -> None:
    flops = peak_flops(torch.device("cpu"), dtype)
    assert flops is not None and 1e8 < flops < 1e14


def test_of_the_products_of_a_third_of_a_second_the_fastest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.cycle([0.02, 0.0, 0.03, 0.0, 0.01, 0.0])  # of a product, and of nothing between two
    read = list(itertools.islice(itertools.accumulate(seconds, initial=0.0), 100))
    left = iter([0.0, *read])
    monkeypatch.setattr("launch.train.hardware.time.perf_counter", lambda: next(left))
    assert measured_cpu_flops("float32") == pytest.approx(2 * 512**3 / 0.01)
    assert next(left) == pytest.approx(0.3, abs=0.05)


def test_peak_memory_grows_by_what_is_touched() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    touched = torch.ones(50_000_000)
    assert peak_memory_bytes(torch.device("cpu")) - before > 100e6
    assert touched[0] == 1


def share(num_threads: int) -> float:
    """Of the CPUs, as ranks with so many threads each see it."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    init_process_group(torch.device("cpu"))
    try:
        return share_of_cpus()
    finally:
        torch.distributed.destroy_process_group()
        torch.set_num_threads(before)  # these processes run other tests too, which compare bits


def test_more_ranks_than_cpus_do_not_raise_the_peak_of_a_machine(pool: RankPool) -> None:
    assert pool.run(1, share, 1) == [1.0]
    assert pool.run(8, share, usable_cpus()) == [1 / 8] * 8
