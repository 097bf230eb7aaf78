"""How a failure went on, as sections: what the ranks did in time, the rungs climbed after it, the search around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.frontier import Search
from harness.report.chain import ARROW, answer, conclusion, outcome
from harness.report.parts import Link, Section, facts_section, plain_json, table_section, when, word
from harness.report.words import MISSING, Cell, duration, one_line
from harness.schema import Attempt, PassedOver, RankObservation, Record, Rung

HEAD = ("time", "rank", "what", "file:line")


def changed(rung: Rung) -> str:
    """What a rung changed: `seq_len 8,192 -> 4,096, grad_accum 1 -> 2`."""
    parts = [f"{one.field} {plain_json(one.before)} {ARROW} {plain_json(one.after)}" for one in rung.change]
    return one_line(", ".join(parts), 200)


def ladder_sections(record: Record, chain: Sequence[Record], link: Link) -> list[Section | None]:
    """The ladder as a chain of records, and the rungs that were passed over."""
    if not chain:
        return []
    rows = [_step(number, one, record, link) for number, one in enumerate(chain)]
    head = ("rung", "change", "how it ended", "case")
    passed = [
        (word(one.rung), word(one.why), word(len(chain) if step is None else step))
        for step, found in _passed_over(chain)
        for one in found
    ]
    table = table_section("Ladder", head, rows, open=True)
    facts = [("What came of it", word(conclusion(chain))), *_this_rung(record)]
    return [facts_section("Ladder in short", facts, open=True), table,
            table_section("Rungs passed over", ("rung", "why", "before try"), passed)]  # fmt: skip


def _step(number: int, one: Record, shown: Record, link: Link) -> tuple[Cell, ...]:
    rung = one.rung
    mark = " (this one)" if one.case_id == shown.case_id else ""
    name = f"{rung.code} {rung.name}" if rung else "as planned" if number == 0 else "planned by the matrix"
    address = link(f"cases/{one.case_id}/record.json")
    return (word(f"{number}. {name}" if number else name), word(changed(rung) if rung else MISSING),
            word(outcome(one)), Cell(one_line(one.case_id + mark, 160), "", None, address))  # fmt: skip


def _this_rung(record: Record) -> list[tuple[str, Cell]]:
    if record.rung is None:
        return []
    same = {True: "the same", False: "changed", None: MISSING}[record.rung.keeps_effective_batch]
    return [("Why this rung", word(record.rung.why)), ("What it costs", word(record.rung.cost)),
            ("Effective batch", word(same))]  # fmt: skip


def _passed_over(chain: Sequence[Record]) -> Iterator[tuple[int | None, Sequence[PassedOver]]]:
    for number, one in enumerate(chain):
        if one.rung and one.rung.passed_over:
            yield number, one.rung.passed_over
    end = chain[-1].ladder_end
    if end and end.passed_over:
        yield None, end.passed_over


# ---------------------------------------------------------------- time


def timeline_section(attempt: Attempt, link: Link) -> Section | None:
    """What the ranks of a failed attempt did last and what went wrong, in time; the initiating event is marked."""
    if attempt.diagnosis is None or not attempt.jobs:
        return None
    begun = min(job.outcome.start for job in attempt.jobs)
    events = sorted(_events(attempt, link), key=lambda event: event[0])
    rows = [
        (Cell(f"{when(t)[11:19]} +{duration(max(0.0, t - begun)).text}"), word(MISSING if rank is None else rank),
         word(what), place)
        for t, rank, what, place in events
    ]  # fmt: skip
    return table_section("Timeline", HEAD, rows, open=True)


Event = tuple[float, int | None, str, Cell]


def _events(attempt: Attempt, link: Link) -> Iterator[Event]:
    nowhere = Cell(MISSING)
    for job in attempt.jobs:
        ended = job.outcome
        yield ended.start, None, f"{job.environment} job starts", nowhere
        how = f"signal {ended.signal}" if ended.signal else f"exit code {ended.exit_code}"
        flags = [name.replace("_", " ") for name in ("timed_out", "stalled", "interrupted", "lost", "host_oom_killed")
                 if getattr(ended, name)]  # fmt: skip
        yield ended.end, None, f"{job.environment} job ends: {', '.join([how, *flags])}", nowhere
    for rank in attempt.observation.ranks:
        if last := _last_step(rank):
            yield last[0], rank.rank, f"ends step {last[1]}, its last", nowhere
    yield from _errors(attempt, link)


def _last_step(rank: RankObservation) -> tuple[float, int] | None:
    """When the last step of a rank ended (its start where its length is unknown), and its number."""
    steps = rank.steps
    for start, length, step in zip(
        reversed(steps.start), reversed(steps.step_time_s), reversed(steps.step), strict=True
    ):
        if start is not None:
            return start + (length or 0.0), step
    return None


def _errors(attempt: Attempt, link: Link) -> Iterator[Event]:
    quotes = attempt.diagnosis.evidence if attempt.diagnosis else ()
    roles = {(quote.file, quote.line): quote.role for quote in quotes}
    for error in attempt.observation.errors:
        t, rank, file, line = (error.get(name) for name in ("t", "rank", "file", "line"))
        if not isinstance(t, float | int):
            continue
        role = roles.get((str(file), line if isinstance(line, int) else -1))
        mark = {"initiating": "INITIATING: "}.get(role or "", f"{role}: " if role else "")
        said = " ".join(str(error.get(name) or "") for name in ("type", "message"))
        place = Cell(one_line(f"{file}:{line}", 160), "", None, link(f"jobs/{file}")) if file else Cell(MISSING)
        yield float(t), rank if isinstance(rank, int) else None, f"{mark}{said}", place


# ---------------------------------------------------------------- searches


def search_sections(found: Search | None) -> list[Section | None]:
    """The search that a case belongs to: its answer, and what it ran."""
    if found is None:
        return []
    rows = [
        (
            word(f"{one.value:,}"),
            word(one.state if one.state != "unknown" else "not measured"),
            word(one.failure or MISSING),
        )
        for one in found.points
        if one.record is not None and one.record.status != "skipped"
    ]
    facts = [("Answer", word(answer(found)))]
    return [facts_section(f"Search for the largest {found.axis}", facts, open=True),
            table_section(f"Tried {found.axis}", (found.axis, "it", "class"), rows, open=True)]  # fmt: skip
