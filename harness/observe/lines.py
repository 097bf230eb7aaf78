"""One function for each kind of line that a payload may write (`events`): what it adds to what was seen before.

None raises on a line's content: a value that is no value of its kind is left out, a line that lacks what it is about
goes to `problems`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import JsonValue

from harness.observe.coerce import Json, count, json_value, mapping, real, seconds, text
from harness.schema import Latency, LoadPoint, Nonfinite, PhaseMemory, ProbeArrival, ProbeCheck, ProbeSeries, Smoke

MAX_NOTES = 30
MAX_LIBRARIES = 100
MAX_PHASES = 24
"""Phases of one rank, in memory and in time."""

MAX_CHECKS = 64
MAX_SIZES = 32
MAX_TIMES = 500

_MEMORY = ("peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes", "peak_rss_bytes")
_LOAD_COUNTS = ("concurrency", "input_len", "output_len", "requests", "completed", "failed", "output_tokens")
_RATES = ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s")
_LATENCY = ("mean_s", "p50_s", "p95_s", "p99_s")
Row = tuple[Any, ...]


@dataclass
class RankSeen:
    """What one rank has said so far."""

    rank: int
    start: dict[str, Any] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    memory: dict[str, PhaseMemory] = field(default_factory=dict)
    rows: dict[int, Row] = field(default_factory=dict)
    checks: list[ProbeCheck] = field(default_factory=list)
    series: dict[int, ProbeSeries] = field(default_factory=dict)
    """All-reduces by size."""
    arrival: ProbeArrival | None = None
    last_phase: str | None = None
    ended: bool = False


@dataclass
class Seen:
    """What one half of a case, training or serving, has said so far."""

    ranks: dict[int, RankSeen] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """Single values by field name of the observation; the first rank that states one wins."""
    phases_s: dict[str, float] = field(default_factory=dict)
    mismatches: dict[str, None] = field(default_factory=dict)
    warmup_steps: int = 0
    nonfinite: list[Nonfinite] = field(default_factory=list)
    loads: dict[str | None, LoadPoint] = field(default_factory=dict)
    smokes: dict[str | None, Smoke] = field(default_factory=dict)
    server_facts: dict[str, JsonValue] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    place: str = ""
    """File and line being read."""

    def problem(self, what: str) -> None:
        """Remember that something at the present place could not be read."""
        self.problems.append(f"{self.place}: {what}" if self.place else what)

    def fact(self, name: str, value: Any) -> None:
        """Keep `value` unless it is missing or already known."""
        if value is not None:
            self.facts.setdefault(name, value)


# ---------------------------------------------------------------- one function per kind of line


def _start(seen: Seen, rank: RankSeen, event: Json) -> None:
    device = mapping(event.get("device"))
    rank.start = {
        "host": text(event.get("host"), 200),
        "pid": count(event.get("pid")),
        "device_name": text(device.get("name"), 200),
        "device_total_bytes": count(device.get("total_bytes")),
        "baseline_rss_bytes": count(event.get("baseline_rss_bytes")),
        "versions_sha256": text(event.get("versions_sha256"), 80),
    }
    seen.fact("earlier_cases", count(event.get("earlier_cases")))
    for name, version in list(mapping(event.get("libraries")).items())[:MAX_LIBRARIES]:
        if isinstance(name, str) and isinstance(version, str):
            rank.libraries[text(name, 80) or ""] = text(version, 80) or ""
    for name, version in rank.libraries.items():
        seen.libraries.setdefault(name, version)


def _phase(seen: Seen, rank: RankSeen, event: Json) -> None:
    name, state = text(event.get("name"), 40), event.get("state")
    if not name or state not in ("begin", "end"):
        seen.problem("a phase without a name or state")
        return
    rank.last_phase = name
    duration = seconds(event.get("duration_s"))
    if state == "end" and duration is not None and len(seen.phases_s) < MAX_PHASES:
        seen.phases_s.setdefault(name, round(duration, 6))


def _memory(seen: Seen, rank: RankSeen, event: Json) -> None:
    phase = text(event.get("phase"), 40)
    if not phase or (phase not in rank.memory and len(rank.memory) >= MAX_PHASES):
        seen.problem("memory without a phase, or of too many phases")
        return
    before = rank.memory.get(phase, PhaseMemory(phase=phase))
    peaks = {name: _larger(getattr(before, name), count(event.get(name))) for name in _MEMORY}
    rank.memory[phase] = PhaseMemory(phase=phase, **peaks)


def _larger(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)


def _proof(seen: Seen, rank: RankSeen, event: Json) -> None:
    proof = json_value({k: v for k, v in event.items() if k not in ("kind", "t", "m", "mismatches")})
    seen.fact("proof", proof)
    mismatches = event.get("mismatches")
    for sentence in mismatches[:MAX_NOTES] if isinstance(mismatches, list) else ():
        if found := text(sentence, 500):
            seen.mismatches[found] = None


def _step(seen: Seen, rank: RankSeen, event: Json) -> None:
    step = count(event.get("step"))
    if not step:
        seen.problem("a step without a number")
        return
    start = seconds(event.get("start"))
    times = (_six(seconds(event.get(name))) for name in ("step_time_s", "data_wait_s", "before_collective_s"))
    counts = (count(event.get(name)) for name in ("tokens", "padded_tokens"))
    values = (_six(real(event.get(name))) for name in ("loss", "grad_norm"))
    rank.rows[step] = (step, None if start is None else round(start, 3), *times, *counts, *values)
    if event.get("warmup") is True:
        seen.warmup_steps = max(seen.warmup_steps, step)
    if _is_nonfinite(event.get("loss")):
        seen.nonfinite.append(Nonfinite(step=step, rank=rank.rank, what="loss"))


def _six(value: float | None) -> float | None:
    """`value` rounded to 6 significant digits."""
    return None if value is None else float(f"{value:.6g}")


def _is_nonfinite(value: Any) -> bool:
    """Is it a NaN or infinity, as `events` spells it or as lenient JSON does."""
    return value in ("nan", "inf", "-inf") or (isinstance(value, float) and not math.isfinite(value))


def _nonfinite(seen: Seen, rank: RankSeen, event: Json) -> None:
    step, what = count(event.get("step")), text(event.get("what"), 40)
    if step is None or not what:
        seen.problem("a nonfinite line without a step or a name")
        return
    seen.nonfinite.append(Nonfinite(step=step, rank=rank.rank, what=what))


def _eval(seen: Seen, rank: RankSeen, event: Json) -> None:
    seen.fact("eval_loss", _six(real(event.get("loss"))))
    if _is_nonfinite(event.get("loss")):
        seen.nonfinite.append(Nonfinite(step=max(rank.rows, default=0), rank=rank.rank, what="eval_loss"))


def _save(seen: Seen, rank: RankSeen, event: Json) -> None:
    seen.fact("checkpoint_bytes", count(event.get("bytes")))
    writer = count(event.get("writer_rank"))
    if writer is not None and seen.facts.get("checkpoint_writer", writer) != writer:
        seen.problem(f"a second checkpoint writer, rank {writer}")
    seen.fact("checkpoint_writer", writer)


def _reload(seen: Seen, rank: RankSeen, event: Json) -> None:
    ok = event.get("ok")
    if isinstance(ok, bool):
        seen.facts["reload_ok"] = ok and seen.facts.get("reload_ok", True)
    seen.fact("reload_max_abs_logit_difference", _six(real(event.get("max_abs_logit_difference"))))


def _merge(seen: Seen, rank: RankSeen, event: Json) -> None:
    seen.fact("merge_s", seconds(event.get("duration_s")))
    seen.fact("merge_peak_rss_bytes", count(event.get("peak_rss_bytes")))


def _server(seen: Seen, rank: RankSeen, event: Json) -> None:
    for name in ("argv", "port"):
        if name in event:
            seen.server_facts[name] = json_value(event[name])


def _ready(seen: Seen, rank: RankSeen, event: Json) -> None:
    seen.fact("ready_s", seconds(event.get("ready_s")))
    for name in ("weights_bytes", "kv_cache_bytes", "kv_cache_tokens"):
        seen.fact(name, count(event.get(name)))
    facts = json_value(mapping(event.get("facts")))
    if isinstance(facts, dict):
        seen.server_facts.update(facts)


def _latency(value: Any) -> Latency:
    found = mapping(value)
    return Latency(**{name: _six(seconds(found.get(name))) for name in _LATENCY})


def _load_point(seen: Seen, rank: RankSeen, event: Json) -> None:
    counts = {name: count(event.get(name)) for name in _LOAD_COUNTS}
    duration = seconds(event.get("duration_s"))
    missing = [name for name, value in counts.items() if value is None]
    if missing or duration is None:
        seen.problem(f"a load point without {', '.join(missing) or 'duration_s'}")
        return
    fields: dict[str, Any] = {**counts, **{name: _six(seconds(event.get(name))) for name in _RATES}}
    seen.loads[text(event.get("case_id"), 200)] = LoadPoint(
        duration_s=round(duration, 6),
        ttft=_latency(event.get("ttft")),
        tpot=_latency(event.get("tpot")),
        itl=_latency(event.get("itl")),
        ended=seconds(event.get("ended")),
        **fields,
    )


def _smoke(seen: Seen, rank: RankSeen, event: Json) -> None:
    ok = event.get("ok")
    if not isinstance(ok, bool):
        seen.problem("a smoke test without its verdict")
        return
    checks = list(mapping(event.get("checks")).items())[:50]
    seen.smokes[text(event.get("case_id"), 200)] = Smoke(
        ok=ok,
        latency_s=_six(seconds(event.get("latency_s"))),
        generated_tokens=count(event.get("generated_tokens")),
        text=text(event.get("text"), 2000) or "",
        checks={text(name, 80) or "": value for name, value in checks if isinstance(value, bool)},
    )


def _check(seen: Seen, rank: RankSeen, event: Json) -> None:
    name, ok = text(event.get("name"), 60), event.get("ok")
    if not name or not isinstance(ok, bool) or len(rank.checks) >= MAX_CHECKS:
        seen.problem("a check without its name or verdict, or one too many")
        return
    found, expected = real(event.get("found")), real(event.get("expected"))
    rank.checks.append(ProbeCheck(rank=rank.rank, name=name, ok=ok, expected=expected, found=found))


def _arrival(seen: Seen, rank: RankSeen, event: Json) -> None:
    rank.arrival = ProbeArrival(rank=rank.rank, work_s=_times(event, "work_s"), wait_s=_times(event, "wait_s"))


def _collective(seen: Seen, rank: RankSeen, event: Json) -> None:
    size = count(event.get("size_bytes"))
    if not size or (size not in rank.series and len(rank.series) >= MAX_SIZES):
        seen.problem("a collective without a size, or of too many sizes")
        return
    seen.fact("timer", text(event.get("timer"), 40))
    warmup = count(event.get("warmup")) or 0
    rank.series[size] = ProbeSeries(rank=rank.rank, size_bytes=size, warmup=warmup, time_s=_times(event, "time_s"))


def _times(event: Json, name: str) -> tuple[float | None, ...]:
    """A column of seconds, of which a value that is none stays as nothing."""
    values = event.get(name)
    return tuple(_six(seconds(value)) for value in values[:MAX_TIMES]) if isinstance(values, list) else ()


def _server_memory(seen: Seen, rank: RankSeen, event: Json) -> None:
    peak = _larger(seen.facts.get("peak_rss_bytes"), count(event.get("peak_rss_bytes")))
    if peak is not None:
        seen.facts["peak_rss_bytes"] = peak


def _note(seen: Seen, rank: RankSeen, event: Json) -> None:
    if found := text(event.get("text"), 300):
        seen.notes[found] = None


def _error(seen: Seen, rank: RankSeen, event: Json) -> None:
    file, _, line = seen.place.rpartition(":")
    seen.errors.append(
        {
            "rank": rank.rank,
            "case_id": text(event.get("case_id"), 200),
            "t": real(event.get("t")),
            "phase": text(event.get("phase"), 40) or rank.last_phase,
            "type": text(event.get("type"), 200) or "",
            "message": text(event.get("message"), 3000) or "",
            "traceback": text(event.get("traceback"), 6000, keep_end=True) or "",
            "file": file,
            "line": int(line),
        }
    )


def _end(seen: Seen, rank: RankSeen, event: Json) -> None:
    rank.ended = True


def _alive(seen: Seen, rank: RankSeen, event: Json) -> None:
    """A sign of life says nothing that an observation keeps."""


KINDS: dict[str, Callable[[Seen, RankSeen, Json], None]] = {
    "start": _start, "phase": _phase, "memory": _memory, "proof": _proof, "step": _step, "eval": _eval, "save": _save,
    "reload": _reload, "merge": _merge, "nonfinite": _nonfinite, "server": _server, "ready": _ready,
    "load_point": _load_point, "smoke": _smoke, "server_memory": _server_memory, "check": _check,
    "arrival": _arrival, "collective": _collective, "alive": _alive, "note": _note,
    "error": _error, "end": _end,
}  # fmt: skip
