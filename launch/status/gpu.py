"""How a GPU is, as NVIDIA's management library (NVML) sees it: the one place that imports it (extra `gpu`)."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}
"""Bits of NVML's clock event reasons (nvml.h, nvmlClocksEventReason…) that mean less speed than the work asks for."""


@dataclass(frozen=True)
class GpuHealth:
    """What NVML says of one GPU; None for what this one does not tell."""

    name: str
    temperature_celsius: int | None
    sm_clock_mhz: int | None
    max_sm_clock_mhz: int | None
    throttled: list[str]
    """Why its clocks are lower than they could be."""
    memory_used_bytes: int | None
    memory_total_bytes: int | None


class GpuReader:
    """Reads the health of the GPU with this UUID (`GPU-…`); nothing where NVML, its driver or the GPU is not there."""

    def __init__(self, uuid: str | None) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        if uuid is None:
            return
        with suppress(Exception):  # no such module, no driver, or a part of a GPU that NVML knows by another name
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml = pynvml

    def read(self) -> GpuHealth | None:
        """How the GPU is now; takes milliseconds, and longer where its driver is in trouble: not for a step."""
        nvml = self._nvml
        if nvml is None:
            return None
        name = self._ask("nvmlDeviceGetName")
        reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return GpuHealth(
            name=name.decode() if isinstance(name, bytes) else str(name or ""),
            temperature_celsius=self._ask("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            max_sm_clock_mhz=self._ask("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM"),
            throttled=[reason for bit, reason in _REASONS.items() if reasons & bit],
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
        )

    def _ask(self, function: str, *constants: str) -> Any:
        """One answer of NVML; None where this GPU or this version of the library has none."""
        try:
            return getattr(self._nvml, function)(self._handle, *(getattr(self._nvml, name) for name in constants))
        except Exception:  # NVMLError is not a kind of OSError
            return None
