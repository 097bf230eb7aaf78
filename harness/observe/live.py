"""A glance at a running job: the tails of its event files, cheap enough for four times a second on eight ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from harness import events
from harness.observe.coerce import Json, count, mapping, real, seconds, text
from harness.schema import Frozen

TAIL_BYTES = 4_096
"""Read of each rank's file: a dozen steps."""
SERVE_TAIL_BYTES = 65_536
"""Read of a serving job's one file, so that its few milestones are still in it."""
MAX_GPUS = 64
JOB_BYTES = 1_000_000
"""A job.json larger than this is not read."""


class LiveGpu(Frozen):
    """One GPU at the sampler's last look; `None` is not known."""

    memory_used_bytes: int | None = None
    power_w: float | None = None


class Live(Frozen):
    """How far a job is; `None` is not known (yet)."""

    phase: str | None = None
    step: int | None = None
    """The last optimizer step that some rank has finished."""
    total_steps: int | None = None
    step_time_s: float | None = None
    """Of the slowest rank's last step."""
    loss: float | None = None
    """Of the lowest rank that stated one."""
    tokens_per_s: float | None = None
    """Tokens of all ranks' last step over `step_time_s`."""
    ready: bool = False
    """The server answers."""
    load_points_done: int = 0
    load_points: int | None = None
    ended: bool = False
    """Some rank wrote its last line."""
    gpus: tuple[LiveGpu, ...] = ()
    """In the order of nodes and CUDA's ordinals; empty on a CPU."""


def peek(job_dir: Path) -> Live:
    """What the last few kB of each rank's event file in `job_dir` say; an empty `Live` where there is nothing."""
    job_dir = _present(job_dir)
    job = _job(job_dir)
    serving = job.get("role") == "serve"
    paths = events.files(str(job_dir)).values()
    tails = [list(_tail(path, SERVE_TAIL_BYTES if serving else TAIL_BYTES)) for path in paths]
    steps = [step for tail in tails if (step := _last(tail, "step"))]
    times = [value for step in steps if (value := seconds(step.get("step_time_s"))) is not None]
    case, cases = mapping(job.get("case")), job.get("cases")
    # A capped GPU says what fits, never how fast.
    slowest = max(times, default=None) if case.get("memory_cap_gib") is None else None
    return Live(
        phase=next((phase for tail in tails if (phase := _phase(tail))), None),
        step=max((count(step.get("step")) or 0 for step in steps), default=None),
        total_steps=count(case.get("steps")),
        step_time_s=slowest,
        loss=next((loss for step in steps if (loss := real(step.get("loss"))) is not None), None),
        tokens_per_s=sum(count(step.get("tokens")) or 0 for step in steps) / slowest if slowest else None,
        ready=any(event["kind"] in ("ready", "load_point", "smoke") for tail in tails for event in tail),
        load_points_done=sum(event["kind"] == "load_point" for tail in tails for event in tail),
        load_points=len(cases) if isinstance(cases, list) else None,
        ended=any(event["kind"] == "end" for tail in tails for event in tail),
        gpus=_gpus(job_dir),
    )


def _present(job_dir: Path) -> Path:
    """The directory of the case that a shared process (`payload/shared.py`) is at, else the job's own."""
    cases = [(path.stat().st_mtime, path) for path in job_dir.glob("cases/*/job.json")]
    return max(cases)[1].parent if cases else job_dir


def _gpus(job_dir: Path) -> tuple[LiveGpu, ...]:
    """What each node's sampler (`payload/sampler.py`) wrote last."""
    paths = sorted(job_dir.glob("gpu.samples.node*.jsonl"))
    samples = [_last(list(_tail(str(path), TAIL_BYTES)), "sample") for path in paths]
    lists = [sample["gpus"] for sample in samples if sample and isinstance(sample.get("gpus"), list)]
    return tuple(_gpu(row) for rows in lists for row in rows[:MAX_GPUS])


def _gpu(row: object) -> LiveGpu:
    """The first two of a sample's columns."""
    if not isinstance(row, list) or len(row) < 2:
        return LiveGpu()
    return LiveGpu(memory_used_bytes=count(row[0]), power_w=real(row[1]))


def _job(job_dir: Path) -> Json:
    """The content of job.json, or nothing."""
    try:
        with open(job_dir / "job.json", "rb") as file:
            return mapping(json.loads(file.read(JOB_BYTES)))
    except (OSError, ValueError, RecursionError):
        return {}


def _tail(path: str, size: int) -> Iterator[Json]:
    """The events in the last `size` bytes of a file; a line cut at either end is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            lines = file.read(size).split(b"\n")
    except OSError:
        return
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("kind"), str):
            yield event


def _last(tail: list[Json], kind: str) -> Json | None:
    return next((event for event in reversed(tail) if event["kind"] == kind), None)


def _phase(tail: list[Json]) -> str | None:
    """The phase that the tail ends in; after a step, and with no word since, it is training."""
    for event in reversed(tail):
        if event["kind"] == "phase":
            return text(event.get("name"), 40)
        if event["kind"] == "step":
            return "train"
    return None
