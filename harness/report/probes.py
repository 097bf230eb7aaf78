"""Probes in the report: their columns, remarks and sections."""

from __future__ import annotations

from collections.abc import Callable

from harness.report.entry import Entry
from harness.report.parts import Section, facts_section, plain_json, table_section, word
from harness.report.words import MISSING, TIMES, Cell, count, digits, duration, missing, plural, size
from harness.schema import Attempt, NcclFacts, ProbeCase
from harness.summary.probes import ProbeSize, ProbeSummary

GB = 1e9
"""Bandwidths are shown in GB/s of 10^9 bytes, as nccl-tests does."""


def gb_per_s(value: float | None) -> Cell:
    """Bytes per second in GB/s, without the unit."""
    return missing() if value is None else Cell(digits(value / GB), f"{value:,.0f} bytes/s", value)


def of_probe(pick: Callable[[ProbeSummary], Cell]) -> Callable[[Entry], Cell]:
    """A cell of a probe's row."""
    return lambda entry: pick(entry.probe) if entry.probe else missing(entry.why_missing)


def of_case(pick: Callable[[ProbeCase], Cell]) -> Callable[[Entry], Cell]:
    """A cell of what a probe was asked."""
    return lambda entry: pick(entry.case) if isinstance(entry.case, ProbeCase) else missing()


def bus(probe: ProbeSummary) -> Cell:
    """The largest bus bandwidth and the size that reached it."""
    cell = gb_per_s(probe.bus_bytes_per_s)
    return cell._replace(why=f"all-reduce of {size(probe.bus_size_bytes).text}, by the median") \
        if probe.bus_bytes_per_s else cell  # fmt: skip


def key_number(entry: Entry) -> Cell:
    """The one number of a probe that a list shows."""
    cell = bus(entry.probe) if entry.probe else missing(entry.why_missing)
    return cell._replace(text=f"{cell.text} GB/s bus") if cell.sort is not None else cell


def transport(entry: Entry) -> Cell:
    """How the ranks were connected, as NCCL's log or the kernel says."""
    attempt = entry.record.last
    seen = attempt.observation if attempt else None
    if seen and seen.nccl and seen.nccl.transports:
        return word(", ".join(seen.nccl.transports))
    used = seen.probe.proof.get("interfaces") if seen and seen.probe else None
    return word(f"TCP over {plain_json(used)}") if used else missing()


# ---------------------------------------------------------------- a probe's detail


def probe_sections(entry: Entry, attempt: Attempt) -> list[Section | None]:
    """Results, all-reduces by size, and who comes late."""
    seen, probe = attempt.observation.probe, entry.summary.probe if entry.summary else None
    if seen is None or probe is None:
        return []
    checks = Cell(f"{probe.checks - probe.wrong} of {plural(probe.checks, 'known result')} came out right")
    facts = [
        ("Known results", checks),
        ("Largest bus bandwidth, GB/s", bus(probe)),
        ("Shortest all-reduce", duration(probe.latency_s)),
        ("Comes late", _late(probe)),
        ("Ranks are connected by", transport(entry)),
        ("Timed by", word(seen.timer) if seen.timer else missing()),
    ]
    chosen = _chosen(attempt.observation.nccl)
    rows = [(*_size_row(one), *((word(chosen.get(one.size_bytes, MISSING)),) if chosen else ())) for one in probe.sizes]
    head = ("size", "n", "median", "min", "max", "alg. GB/s", "bus GB/s", *(("NCCL chose",) if chosen else ()))
    return [
        facts_section("Probe results", facts, open=True),
        table_section("All-reduce by size, as the slowest rank timed it", head, rows, open=True),
        _arrivals(probe),
    ]


def _chosen(nccl: NcclFacts | None) -> dict[int, str]:
    """By size, what NCCL chose for an all-reduce."""
    choices = [one for one in (nccl.choices if nccl else ()) if one.collective == "AllReduce"]
    return {one.size_bytes: f"{one.algorithm} {one.protocol}, {plural(one.channels, 'channel')}" for one in choices}


def _size_row(one: ProbeSize) -> tuple[Cell, ...]:
    return (size(one.size_bytes), count(one.n), duration(one.median_s), duration(one.min_s), duration(one.max_s),
            gb_per_s(one.algorithm_bytes_per_s), gb_per_s(one.bus_bytes_per_s))  # fmt: skip


def _late(probe: ProbeSummary) -> Cell:
    if probe.late_ratio is None:
        return missing("needs two ranks")
    if probe.late_rank is None:
        return Cell(f"no rank (the longest work is {probe.late_ratio:.2f} {TIMES} the median)")
    return Cell(f"rank {probe.late_rank}: its work takes {probe.late_ratio:.2f} {TIMES} the median; the others wait")


def _arrivals(probe: ProbeSummary) -> Section | None:
    rows = [(Cell(str(rank)), duration(work), duration(probe.wait_s.get(rank)), count(probe.rounds))
            for rank, work in probe.work_s.items()]  # fmt: skip
    head = ("rank", "work until it arrives", "in the all-reduce", "n rounds")
    return table_section("Arrival at a collective, median of each rank", head, rows, open=True)
