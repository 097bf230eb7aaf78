"""Memory as a function of a case's size, recorded and made up, and a search over it with records as GPUs leave them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fakes import records

from harness import frontier, schema
from harness.schema import Record, TrainCase, case_id
from harness.store import read_record, records_below

ROOT = Path(__file__).resolve().parents[2]
CASE = records.train_case(device="cuda")
Ends = Callable[[int], str | None]
"""How a case of that length ends: a failure class, or `None` where it is measured."""
Peak = Callable[[int], float]
"""Bytes that a case of that length holds at most."""


def as_record(case: TrainCase, failure: str | None, peak: float = 0, load: float = 0, room: float = 0) -> Record:
    """A record of `case` that ran, or failed so; with 0 it knows nothing of memory."""
    outcome = schema.Outcome(exit_code=0 if failure is None else 1, start=1.0, end=2.0)
    diagnosis = failure and schema.Diagnosis(failure_class=failure, summary="It failed.")
    job = schema.JobRun(job_id="j", environment="train", dir="jobs/j.1", outcome=outcome)
    phases = [("load", load), *([("backward", peak)] if failure is None else [])]
    memory = tuple(schema.PhaseMemory(phase=name, peak_allocated_bytes=int(size)) for name, size in phases if size > 0)
    ran = schema.TrainObservation(proof={"memory_cap": {"allowed_bytes": int(room)}} if room > 0 else {})
    observation = schema.Observation(ranks=(schema.RankObservation(rank=0, memory=memory),), train=ran)
    attempt = schema.Attempt(number=1, jobs=(job,), observation=observation, diagnosis=diagnosis or None)
    return Record(
        case_id=case_id(case), case=case, status="failed" if failure else "measured", attempts=(attempt,),
        frontier="seq_len", finished_at=2.0,
    )  # fmt: skip


def searched(
    values: Sequence[int], ends: Ends, peak: Peak = lambda _: 0, load: float = 0, room: float = 0
) -> tuple[frontier.Search, dict[int, Record]]:
    """A search over `values` to its end, and what it ran."""
    cases = [CASE.model_copy(update={"seq_len": value}) for value in values]
    by_id = {case_id(case): case for case in cases}
    done: dict[int, Record] = {}
    for _ in range(len(values) + 1):
        found = frontier.search("seq_len", cases, {record.case_id: record for record in done.values()})
        if found.next is None:
            break
        case = by_id[found.next.case_id]
        assert case.seq_len not in done
        done[case.seq_len] = as_record(case, ends(case.seq_len), peak(case.seq_len), load, room)
    assert found.next is None
    return found, done


# ---------------------------------------------------------------- surfaces


def recorded() -> dict[str, tuple[float, dict[int, int]]]:
    """Bytes after loading and peaks by length, of each committed case measured at three lengths."""
    found: dict[str, tuple[float, dict[int, int]]] = {}
    for path in records_below(ROOT / "reports"):
        record = read_record(path)
        case = record.case
        if record.status != "measured" or not isinstance(case, TrainCase) or case.memory_cap_gib is not None:
            continue
        name = f"{path.parents[2].name}/{frontier.group(case, 'seq_len')}"
        peak, load = frontier.peak_bytes(record), frontier.peak_bytes(record, "load")
        if peak and load:
            found.setdefault(name, (load, {}))[1][case.seq_len] = peak
    return {name: of for name, of in sorted(found.items()) if len(of[1]) >= 3}


def through(known: Mapping[int, int]) -> Peak:
    """The line through neighbouring measured lengths, and on beyond the last of them."""
    lengths = sorted(known)

    def peak(length: int) -> float:
        place = next((at for at in range(1, len(lengths) - 1) if length <= lengths[at]), len(lengths) - 1)
        low, high = lengths[place - 1], lengths[place]
        return known[low] + (known[high] - known[low]) * (length - low) / (high - low)

    return peak


MADE_UP: dict[str, Peak] = {
    "linear": lambda length: 2**34 + 850_000 * length,
    "quadratic": lambda length: 2**34 + 100_000 * length + 40 * length**2,
    "steps": lambda length: 2**34 + -(-length // 4096) * 3 * 2**30,
    "noise": lambda length: 2**34 + 850_000 * length + random.Random(length).uniform(-(2**29), 2**29),
    "flat": lambda length: 2**34,
    "falling": lambda length: 2**36 - 200_000 * length,
}
