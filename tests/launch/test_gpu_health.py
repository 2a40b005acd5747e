"""What NVML says of a GPU is read where it is there, and nothing breaks where it is not."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from launch.status.gpu import GpuHealth, GpuReader


class NVMLError(Exception):
    """As in pynvml, no kind of OSError."""


def fake_nvml(**changes: Any) -> ModuleType:
    """A module with what is used of pynvml, for one GPU."""
    module = ModuleType("pynvml")
    handles = {"GPU-1": "handle"}
    functions: dict[str, Any] = {
        "NVML_TEMPERATURE_GPU": 0,
        "NVML_CLOCK_SM": 1,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: handles[uuid],
        "nvmlDeviceGetName": lambda handle: b"NVIDIA H100",
        "nvmlDeviceGetTemperature": lambda handle, sensor: 83,
        "nvmlDeviceGetClockInfo": lambda handle, clock: 1200,
        "nvmlDeviceGetMaxClockInfo": lambda handle, clock: 1980,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x1 | 0x40 | 0x4,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=70, total=80),
    }
    vars(module).update({**functions, **changes})
    return module


def fail(*_: object) -> None:
    raise NVMLError("not supported")


def test_what_it_says_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    expected = GpuHealth("NVIDIA H100", 83, 1200, 1980, ["power cap", "thermal (hardware)"], 70, 80)
    assert GpuReader("GPU-1").read() == expected


def test_what_a_gpu_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"nvmlDeviceGetTemperature": fail, "nvmlDeviceGetMemoryInfo": fail}
    missing |= {"nvmlDeviceGetCurrentClocksThrottleReasons": fail, "nvmlDeviceGetName": lambda handle: "L4"}
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**missing))
    assert GpuReader("GPU-1").read() == GpuHealth("L4", None, 1200, 1980, [], None, None)


@pytest.mark.parametrize("missing", ["module", "driver", "gpu", "uuid"])
def test_without_it_nothing_is_known(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_nvml(nvmlInit=fail) if missing == "driver" else fake_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", None if missing == "module" else module)  # None: no such module
    uuid = {"uuid": None, "gpu": "GPU-2"}.get(missing, "GPU-1")
    assert GpuReader(uuid).read() is None
