"""What a job's GPUs took and held, all of them together: the GPU part of a summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from harness.schema import Frozen, GpuSeries, GpuSteady


class GpuSummary(Frozen):
    """The GPUs of one job over the time that is measured; `None` where a GPU did not state its part."""

    gpus: int
    duration_s: float | None = None
    energy_j: float | None = None
    """Of all GPUs, idle parts and their memory included, without the host."""
    energy_from: Literal["counter", "power", "both"] | None = None
    """As `GpuSteady.energy_from`; `both` where GPUs differ."""
    joules_per_token: float | None = None
    """Training: over the real tokens of all ranks; serving: over the generated ones."""
    power_mean_w: float | None = None
    """Of all GPUs together: energy over time, or the sum of their sampled means."""
    power_max_w: float | None = None
    """The largest sample of a single GPU."""
    utilisation_mean: float | None = None
    memory_max_bytes: int | None = None
    """The largest of a single GPU over the whole job, as the driver counts it: all processes and contexts."""
    memory_max_ordinal: int | None = None
    temperature_max_c: int | None = None
    throttle: dict[str, float] = Field(default_factory=dict)
    """By reason, the largest share of a single GPU's samples over the whole job."""


def summarize_gpus(series: Sequence[GpuSeries], devices: int) -> GpuSummary | None:
    """The GPUs of one job together; energy only where all its `devices` were sampled. `None` where none was."""
    if not series:
        return None
    steady = [one.steady for one in series if one.steady is not None]
    complete = len(series) >= devices and len(steady) == len(series)
    energy = _energy_j(steady) if complete else None
    duration = steady[0].duration_s if complete else None
    tokens = steady[0].tokens if complete else None
    sources = {one.energy_from for one in steady}
    largest = max(series, key=lambda one: one.memory_max_bytes or -1)
    return GpuSummary(
        gpus=len(series),
        duration_s=duration,
        energy_j=energy,
        energy_from=None if energy is None else "both" if len(sources) > 1 else steady[0].energy_from,
        joules_per_token=energy / tokens if energy is not None and tokens else None,
        power_mean_w=energy / duration if energy is not None and duration else _sum([s.power_mean_w for s in steady]),
        power_max_w=_largest([one.power_max_w for one in steady]),
        utilisation_mean=_mean([one.utilisation_mean for one in steady]),
        memory_max_bytes=largest.memory_max_bytes,
        memory_max_ordinal=largest.ordinal if largest.memory_max_bytes is not None else None,
        temperature_max_c=max((t for one in series if (t := one.temperature_max_c) is not None), default=None),
        throttle=_throttle(series),
    )


def _energy_j(steady: Sequence[GpuSteady]) -> float | None:
    return _sum([one.energy_j for one in steady])


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known and len(known) == len(values) else None


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _mean(values: Sequence[float | None]) -> float | None:
    total = _sum(values)
    return None if total is None else total / len(values)


def _throttle(series: Sequence[GpuSeries]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in series:
        for reason, share in one.throttle.items():
            found[reason] = max(found.get(reason, 0.0), share)
    return found
