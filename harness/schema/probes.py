"""What a probe of the communication between ranks has seen."""

from __future__ import annotations

from pydantic import JsonValue

from harness.schema.base import Frozen


class ProbeCheck(Frozen):
    """One result that is known beforehand, compared on one rank."""

    rank: int
    name: str
    """Such as `all_reduce_sum`, `broadcast`."""
    ok: bool
    expected: float | None = None
    found: float | None = None
    """The value that is furthest from what was expected."""


class ProbeSeries(Frozen):
    """All-reduces of one size as one rank timed them."""

    rank: int
    size_bytes: int
    warmup: int = 0
    """All-reduces of this size before the first that is timed."""
    time_s: tuple[float | None, ...] = ()
    """Each one, from this rank's start of it to its end here: it holds the wait for a rank that comes late."""


class ProbeArrival(Frozen):
    """Rounds of a fixed piece of work and then an all-reduce, on one rank: who comes late works longer, waits less."""

    rank: int
    work_s: tuple[float | None, ...] = ()
    """From the start that all ranks share to this rank's arrival at the all-reduce."""
    wait_s: tuple[float | None, ...] = ()
    """From there to the end of the all-reduce."""


class ProbeObservation(Frozen):
    """What a probe measured, rank by rank."""

    backend: str | None = None
    """`gloo` or `nccl`, as the process group says."""
    timer: str | None = None
    """What timed the all-reduces: `cuda events`, or `host clock`."""
    proof: dict[str, JsonValue] = {}
    """What was set as used (events.py, kind `proof`), of rank 0."""
    proof_mismatches: tuple[str, ...] = ()
    phases_s: dict[str, float] = {}
    """Duration of each phase, of rank 0."""
    checks: tuple[ProbeCheck, ...] = ()
    series: tuple[ProbeSeries, ...] = ()
    """By rank, then as they were measured."""
    arrivals: tuple[ProbeArrival, ...] = ()
