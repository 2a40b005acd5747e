"""The nodes of a run, from what their ranks say of themselves."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launch.status.rank_report import RankReport

SILENT_SECONDS = 120.0
"""A rank whose file is older than that says nothing any more: it writes one every half minute."""


@dataclass(frozen=True)
class NodeStatus:
    """A node. Of its GPUs the worst counts; None without NVML."""

    name: str
    ranks: list[int]
    step: int
    """The least that one of its ranks has trained when it was last heard."""
    silent_seconds: float
    """Since the rank that was silent the longest was heard."""
    own_seconds: float | None
    """The longest that one of its ranks takes for its own part of a step."""
    memory_bytes: int
    """The largest of its ranks' peaks."""
    gpu: str
    temperature_celsius: int | None
    sm_clock_mhz: int | None
    max_sm_clock_mhz: int | None
    throttled: list[str]
    """Why clocks are lower than they could be, and of which rank's GPU."""
    gpu_memory_used_bytes: int | None
    gpu_memory_total_bytes: int | None


def nodes_of(reports: Sequence[RankReport]) -> list[NodeStatus]:
    """The nodes in the order of their first ranks."""
    names = dict.fromkeys(report.node for report in reports)
    return [_node(name, [report for report in reports if report.node == name]) for name in names]


def _node(name: str, reports: Sequence[RankReport]) -> NodeStatus:
    gpus = {report.rank: report.gpu for report in reports if report.gpu is not None}
    own = [report.windows[-1].own_seconds for report in reports if report.windows]
    return NodeStatus(
        name=name,
        ranks=[report.rank for report in reports],
        step=min(report.step for report in reports),
        silent_seconds=max(0.0, time.time() - min(report.time for report in reports)),
        own_seconds=max((seconds for seconds in own if seconds is not None), default=None),
        memory_bytes=max(report.memory_bytes for report in reports),
        gpu=next((gpu.name for gpu in gpus.values()), ""),
        temperature_celsius=max(_known(gpu.temperature_celsius for gpu in gpus.values()), default=None),
        sm_clock_mhz=min(_known(gpu.sm_clock_mhz for gpu in gpus.values()), default=None),
        max_sm_clock_mhz=max(_known(gpu.max_sm_clock_mhz for gpu in gpus.values()), default=None),
        throttled=[f"rank {rank}: {why}" for rank, gpu in gpus.items() for why in gpu.throttled],
        gpu_memory_used_bytes=max(_known(gpu.memory_used_bytes for gpu in gpus.values()), default=None),
        gpu_memory_total_bytes=min(_known(gpu.memory_total_bytes for gpu in gpus.values()), default=None),
    )


def _known(values: Iterable[int | None]) -> list[int]:
    return [value for value in values if value is not None]
