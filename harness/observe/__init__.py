"""Event files of a job -> Observation. Whatever a payload wrote, or half wrote, is taken or named, never raised on.

A number is taken only from a JSON number that is finite (a bool is none); what cannot be read goes to `problems` with
file and line. Text is scrubbed and clipped. So that a record stays small, series are rounded to 6 significant digits
and, beyond `MAX_ROWS` rows over all ranks, thinned to blocks of `BLOCK` consecutive steps, spaced evenly from the first
step to the last and the same on every rank; a note says so, and the full series stays in the event files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import JsonValue

from harness import events
from harness.logs import log_text, tail
from harness.observe import nccl, telemetry
from harness.observe.coerce import text
from harness.observe.lines import KINDS, MAX_NOTES, RankSeen, Seen
from harness.observe.live import Live, peek
from harness.observe.probes import probe
from harness.observe.versions import odd_ranks
from harness.schema import (
    Case,
    ChainCase,
    GpuSeries,
    Observation,
    ProbeCase,
    RankObservation,
    ServeCase,
    ServeObservation,
    Steps,
    TrainCase,
    TrainObservation,
    case_id,
)

__all__ = ["Live", "kept_steps", "log_text", "observe", "peek", "tail"]

MAX_ROWS = 800
"""Rows of step series over all ranks that a record keeps: about 140 kB of JSON with one value a line."""
MIN_ROWS = 20
"""Rows that each rank keeps however many ranks there are."""
BLOCK = 10
MAX_PROBLEMS = 20
MAX_ERRORS = 16
MAX_ERROR_CHARS = 24_000
MAX_RANK = 65_535
WARM = ("Measured in a process that had measured other cases before: what the allocator reserves, what the GPU has in "
        "use in all, and the first step's time are left out.")  # fmt: skip

# ---------------------------------------------------------------- files


def _read(job_dirs: Iterable[Path]) -> Seen:
    """All that the event files of `job_dirs` say, rank by rank."""
    seen = Seen()
    for job_dir in job_dirs:
        for rank, path in events.files(str(job_dir)).items():
            name = f"{job_dir.name}/{os.path.basename(path)}"
            if rank > MAX_RANK:
                seen.problem(f"{name}: no such rank")
            else:
                _read_file(seen, seen.ranks.setdefault(rank, RankSeen(rank)), path, name)
    return seen


def _read_file(seen: Seen, rank: RankSeen, path: str, name: str) -> None:
    """Add one file to `seen`."""
    try:
        for number, event in events.read(path):
            seen.place = f"{name}:{number}"
            handle = KINDS.get(event["kind"]) if event else None
            if event is None or handle is None:
                seen.problem("no event" if event is None else f"unknown kind {text(event['kind'], 40)!r}")
            else:
                handle(seen, rank, event)
    except OSError as error:
        seen.problem(f"cannot be read ({error.strerror})")
    seen.place = ""


# ---------------------------------------------------------------- what is kept


def kept_steps(steps: Sequence[int], limit: int) -> set[int]:
    """Of sorted `steps`, at most `limit` in blocks of `BLOCK`, the first and the last among them; `limit` >= 20."""
    if len(steps) <= limit:
        return set(steps)
    blocks = limit // BLOCK
    starts = [round(index * (len(steps) - BLOCK) / (blocks - 1)) for index in range(blocks)]
    return {step for start in starts for step in steps[start : start + BLOCK]}


def _ranks(seen: Seen) -> tuple[RankObservation, ...]:
    """Each rank's part, series thinned where they are too long; says so in a note."""
    steps = sorted(set().union(*(rank.rows for rank in seen.ranks.values())))
    kept = kept_steps(steps, max(MIN_ROWS, MAX_ROWS // max(1, len(seen.ranks))))
    if len(kept) < len(steps):
        note = f"The record keeps {len(kept)} of {len(steps)} steps per rank, in blocks of {BLOCK}."
        seen.notes = {note: None, **seen.notes}
    return tuple(_rank(rank, kept) for _, rank in sorted(seen.ranks.items()))


def _rank(rank: RankSeen, kept: set[int]) -> RankObservation:
    columns = zip(*(row for step, row in sorted(rank.rows.items()) if step in kept), strict=True)
    return RankObservation(
        rank=rank.rank,
        **rank.start,
        memory=tuple(rank.memory.values()),
        steps=Steps(**dict(zip(Steps.model_fields, columns, strict=False))),
        last_phase=rank.last_phase,
        ended=rank.ended,
    )


def _steady_window(seen: Seen, warmup_steps: int) -> telemetry.Window | None:
    """From the first rank's first steady step to the last rank's last, and the tokens of all ranks in these steps."""
    warmup = max(warmup_steps, seen.warmup_steps)
    rows = [dict(zip(Steps.model_fields, row, strict=False)) for rank in seen.ranks.values()
            for step, row in rank.rows.items() if step > warmup]  # fmt: skip
    spans = [(row["start"], row["start"] + row["step_time_s"]) for row in rows
             if row["start"] is not None and row["step_time_s"] is not None]  # fmt: skip
    if not spans or len(spans) < len(rows):
        return None
    tokens = [row["tokens"] for row in rows]
    start, end = min(start for start, _ in spans), max(end for _, end in spans)
    return telemetry.Window(start, end, None if None in tokens else sum(tokens))


def _load_window(seen: Seen, ids: set[str]) -> telemetry.Window | None:
    """The time and the generated tokens of the load of the case that has one of `ids`."""
    load = next((point for name, point in seen.loads.items() if name in ids), None)
    if load is None or load.ended is None:
        return None
    return telemetry.Window(load.ended - load.duration_s, load.ended, load.output_tokens)


def _gpu_rows(ranks: Sequence[RankObservation]) -> int:
    """Rows that the GPUs' columns may have beside these ranks' steps, for one record's size."""
    return max(telemetry.MAX_ROWS // 3, telemetry.MAX_ROWS - sum(len(rank.steps.step) for rank in ranks) // 2)


def _train(seen: Seen, warmup_steps: int) -> TrainObservation | None:
    if not seen.ranks:
        return None
    facts = {name: value for name, value in seen.facts.items() if name in TrainObservation.model_fields}
    return TrainObservation(
        **facts,
        proof_mismatches=tuple(seen.mismatches)[:MAX_NOTES],
        warmup_steps=max(warmup_steps, seen.warmup_steps),
        phases_s=seen.phases_s,
        nonfinite=min(seen.nonfinite, key=lambda found: (found.step, found.rank), default=None),
    )


def _cold(gpu: GpuSeries, train: Seen) -> GpuSeries:
    """The series of a GPU, without its memory where cases before may have left some of it in use."""
    if not train.facts.get("earlier_cases"):
        return gpu
    unknown = (None,) * len(gpu.memory_used_bytes)
    return gpu.model_copy(update={"memory_used_bytes": unknown, "memory_first_bytes": None, "memory_max_bytes": None})


def _serve(seen: Seen, ids: set[str]) -> ServeObservation | None:
    """The serving half, with the load point and smoke test of the case that has one of `ids`."""
    if not seen.ranks:
        return None
    facts = {name: value for name, value in seen.facts.items() if name in ServeObservation.model_fields}
    load = next((point for name, point in seen.loads.items() if name in ids), None)
    smoke = next((found for name, found in seen.smokes.items() if name in ids), seen.smokes.get(None))
    return ServeObservation(**facts, load=load, smoke=smoke, facts=seen.server_facts)


def _errors(halves: Sequence[Seen], ids: set[str]) -> tuple[dict[str, JsonValue], ...]:
    """The earliest errors of this case or of its whole job; beyond a budget of characters they lose their traceback."""
    own = [error for seen in halves for error in seen.errors if error["case_id"] in {None, *ids}]
    errors = sorted(own, key=lambda error: math.inf if error["t"] is None else error["t"])
    spent, found = 0, []
    for error in errors[:MAX_ERRORS]:
        spent += len(error["traceback"]) + len(error["message"])
        short = {**error, "message": error["message"][:500], "traceback": ""}
        found.append(error if spent <= MAX_ERROR_CHARS else short)
    return tuple(found)


def _problems(halves: Sequence[Seen]) -> tuple[str, ...]:
    problems = [problem for seen in halves for problem in seen.problems]
    dropped = sum(len(seen.errors) for seen in halves) - MAX_ERRORS
    if dropped > 0:
        problems.insert(0, f"{dropped} later errors are in the event files alone")
    more = len(problems) - MAX_PROBLEMS
    return (*problems[:MAX_PROBLEMS], *([f"and {more} more"] if more > 0 else []))


def observe(case: Case, job_dirs: Sequence[Path]) -> Observation:
    """What the event files of an attempt say of `case`; an empty Observation where there is nothing.

    `job_dirs` in the order of the jobs: for a chain its training job, then its serving job. Never raises on content.
    """
    chain = isinstance(case, ChainCase)
    first = 0 if isinstance(case, ServeCase) else 1 if chain else len(job_dirs)
    train, serve = _read(job_dirs[:first]), _read(job_dirs[first:])
    halves = (train, serve)
    ids = {case_id(case), case_id(case.serve)} if isinstance(case, ChainCase) else {case_id(case)}
    training = case.train if isinstance(case, ChainCase) else case
    warmup_steps = training.warmup_steps if isinstance(training, TrainCase) else 0
    probing = isinstance(case, ProbeCase)
    probed = probe(train) if probing else None
    ranks = _ranks(serve if isinstance(case, ServeCase) else train)
    rows = _gpu_rows(ranks) // (2 if chain else 1)
    watched = (telemetry.read("train", job_dirs[:first], _steady_window(train, warmup_steps), rows),
               telemetry.read("serve", job_dirs[first:], _load_window(serve, ids), rows))  # fmt: skip
    said = [note for one in watched for note in one.notes]
    said += [WARM] if train.facts.get("earlier_cases") else []
    return Observation(
        ranks=ranks,
        train=None if probing else _train(train, warmup_steps),
        serve=_serve(serve, ids),
        probe=probed,
        errors=_errors(halves, ids),
        notes=tuple({**dict.fromkeys(said), **train.notes, **serve.notes})[:MAX_NOTES],
        libraries={**serve.libraries, **train.libraries},
        odd_ranks=odd_ranks(train),
        problems=(*_problems(halves), *(problem for one in watched for problem in one.problems)),
        gpus=tuple(_cold(gpu, train) for one in watched for gpu in one.gpus),
        nccl=nccl.read(job_dirs),
    )
