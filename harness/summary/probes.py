"""Statistics of a probe: how long an all-reduce takes, what bandwidth that is, and who comes late.

An all-reduce has taken as long as on the rank where it took longest. Algorithm bandwidth is the buffer's bytes over
that time; bus bandwidth is that times 2(n-1)/n, which depends on the links alone and not on the number n of ranks.
Source: nccl-tests, doc/PERFORMANCE.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from pydantic import Field

from harness.schema import Frozen, ProbeArrival, ProbeCase, ProbeObservation, ProbeSeries

LATE_RATIO = 1.20
"""A rank's work over the median of all ranks' from which it is called late (our own threshold)."""


class ProbeSize(Frozen):
    """All-reduces of one size over all ranks."""

    size_bytes: int
    n: int
    """All-reduces whose time every rank stated."""
    warmup: int = 0
    median_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    algorithm_bytes_per_s: float | None = None
    """Of the median."""
    bus_bytes_per_s: float | None = None
    """Of the median."""


class ProbeSummary(Frozen):
    """A probe of the communication between ranks."""

    ranks: int
    sizes: tuple[ProbeSize, ...] = ()
    """By size."""
    latency_s: float | None = None
    """Median of the smallest size."""
    bus_bytes_per_s: float | None = None
    """The largest over the sizes, by their medians."""
    bus_size_bytes: int | None = None
    """The size that reached it."""
    checks: int = 0
    wrong: int = 0
    work_s: dict[int, float] = Field(default_factory=dict)
    """Each rank's median time of a fixed piece of work before a collective."""
    wait_s: dict[int, float] = Field(default_factory=dict)
    """Each rank's median time from its arrival at that collective to its end."""
    rounds: int = 0
    late_rank: int | None = None
    """The rank that works longest, where that is `LATE_RATIO` of the median or more."""
    late_ratio: float | None = None
    """The longest over the median of the ranks' medians; needs two ranks."""


def summarize_probe(case: ProbeCase, seen: ProbeObservation) -> ProbeSummary:
    """The statistics of one probe, as far as it got."""
    by_size: dict[int, list[ProbeSeries]] = {}
    for series in seen.series:
        by_size.setdefault(series.size_bytes, []).append(series)
    sizes = [_size(size, found, case.devices) for size, found in sorted(by_size.items())]
    best = max((size for size in sizes if size.bus_bytes_per_s), key=lambda one: one.bus_bytes_per_s or 0, default=None)
    work, rounds = _medians(seen.arrivals, "work_s")
    wait, _ = _medians(seen.arrivals, "wait_s")
    late_rank, late_ratio = _late(work)
    return ProbeSummary(
        ranks=len({series.rank for series in seen.series}),
        sizes=tuple(sizes),
        latency_s=sizes[0].median_s if sizes else None,
        bus_bytes_per_s=best.bus_bytes_per_s if best else None,
        bus_size_bytes=best.size_bytes if best else None,
        checks=len(seen.checks),
        wrong=sum(not check.ok for check in seen.checks),
        work_s=work,
        wait_s=wait,
        rounds=rounds,
        late_rank=late_rank,
        late_ratio=late_ratio,
    )


def bus_factor(ranks: int) -> float:
    """What algorithm bandwidth is multiplied by for the bus bandwidth of an all-reduce."""
    return 2 * (ranks - 1) / ranks


def _size(size_bytes: int, found: Sequence[ProbeSeries], ranks: int) -> ProbeSize:
    times = [max(values) for values in zip(*(one.time_s for one in found), strict=False) if None not in values]
    known = [time for time in times if time is not None and time > 0]
    if not known:
        return ProbeSize(size_bytes=size_bytes, n=0)
    median = statistics.median(known)
    # A time below any clock's resolution, which only a broken file states, is no speed.
    speed = size_bytes / median if math.isfinite(size_bytes / median) else None
    return ProbeSize(
        size_bytes=size_bytes,
        n=len(known),
        warmup=max(one.warmup for one in found),
        median_s=median,
        min_s=min(known),
        max_s=max(known),
        algorithm_bytes_per_s=speed,
        bus_bytes_per_s=None if speed is None else speed * bus_factor(ranks),
    )


def _medians(found: Sequence[ProbeArrival], name: str) -> tuple[dict[int, float], int]:
    """Each rank's median, and the fewest rounds behind one."""
    known = {one.rank: [value for value in getattr(one, name) if value is not None] for one in found}
    known = {rank: values for rank, values in known.items() if values}
    return {rank: statistics.median(values) for rank, values in known.items()}, min(map(len, known.values()), default=0)


def _late(work: dict[int, float]) -> tuple[int | None, float | None]:
    if len(work) < 2:
        return None, None
    middle = statistics.median(work.values())
    latest = max(work, key=lambda rank: work[rank])
    ratio = work[latest] / middle if middle > 0 else None
    ratio = ratio if ratio is not None and math.isfinite(ratio) else None
    return (latest if ratio is not None and ratio >= LATE_RATIO else None), ratio
