"""What belongs together in a run: the records of one ladder, and those of one search; what each came to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from harness import frontier
from harness.report.words import one_line, plural
from harness.schema import NOT_IDENTITY, AnyCase, ChainCase, Record

ARROW = "\N{RIGHTWARDS ARROW}"
MAX_CHAIN = 1000
"""Longer than any ladder: a loop of parents can only come from records changed by hand."""


def chains(records: Sequence[Record]) -> dict[str, tuple[Record, ...]]:
    """By case id, all records of the ladder that a case stands on, the planned case first."""
    by_id = {record.case_id: record for record in records}
    child: dict[str | None, Record] = {record.parent: record for record in records if record.parent}
    found: dict[str, tuple[Record, ...]] = {}
    for record in records:
        if record.parent in by_id or not (record.ladder_end or record.case_id in child):
            continue
        chain = tuple(_from(record, child, by_id))
        own = [one for one in chain if one.parent or one is record]
        found |= {one.case_id: chain for one in own if one.case_id not in found or one is record}
    return found


def _from(record: Record, child: Mapping[str | None, Record], by_id: Mapping[str, Record]) -> Iterator[Record]:
    seen: set[str] = set()
    here: Record | None = record
    while here is not None and here.case_id not in seen and len(seen) < MAX_CHAIN:
        yield here
        seen.add(here.case_id)
        leads_to = here.ladder_end.leads_to if here.ladder_end else None
        here = child.get(here.case_id) or by_id.get(leads_to or "")


def outcome(record: Record) -> str:
    """How a case of a chain ended, in a few words."""
    diagnosis = record.last.diagnosis if record.last else None
    if record.status == "failed" and diagnosis:
        where = f" in {diagnosis.phase}" if diagnosis.phase else ""
        return one_line(f"failed: {diagnosis.failure_class}{where}", 120)
    return "ran as asked" if record.status == "measured" else record.status


def conclusion(chain: Sequence[Record]) -> str:
    """What a whole ladder came to, in one sentence."""
    last, steps = chain[-1], plural(len(chain) - 1, "rerun")
    if len(chain) == 1:
        reason = last.ladder_end.reason if last.ladder_end else "it has not been climbed"
        return one_line(f"The ladder was not climbed: {reason}.", 300)
    if last.status == "measured" and not _buys_evidence(last):
        return one_line(f"After {steps} it fitted with {together(chain[0].case, last.case)}.", 300)
    diagnosis = chain[0].last.diagnosis if chain[0].last else None
    if diagnosis and diagnosis.showed:
        return one_line(f"After {steps}: {diagnosis.showed}", 300)
    reason = last.ladder_end.reason if last.ladder_end else "it goes on with the next run"
    return one_line(f"{steps[0].upper()}{steps[1:]}, then the ladder ended: {reason}.", 300)


def together(before: AnyCase, after: AnyCase) -> str:
    """All in which two cases differ: `seq_len 512 -> 128, micro_batch 4 -> 2`."""
    one, other = _flat(before), _flat(after)
    parts = [f"{name} {one[name]} {ARROW} {other[name]}" for name in one if name in other and one[name] != other[name]]
    return ", ".join(parts)


def _flat(case: AnyCase) -> dict[str, object]:
    halves = {"": case} if not isinstance(case, ChainCase) else {"train.": case.train, "serve.": case.serve}
    return {f"{half}{name}": value for half, part in halves.items() for name, value in part.model_dump().items()
            if name not in NOT_IDENTITY}  # fmt: skip


def _buys_evidence(record: Record) -> bool:
    return record.rung is not None and record.rung.ladder == "nccl"


# ---------------------------------------------------------------- searches


def answer(found: frontier.Search) -> str:
    """What a search found, in one sentence."""
    runs = f"{plural(found.tries, 'run')} of a grid of {len(found.points)}"
    most = f"{found.axis} {found.fits.value:,} fits" if found.fits else f"no {found.axis} of the grid was seen to fit"
    least = f"{found.fails.value:,} is the first that does not" if found.fails else "none above it was too large"
    if blocked := found.obstacle:
        return f"{most}; {blocked.value:,} failed otherwise ({blocked.failure}), so more is not known; {runs}"
    return f"{most}, {least if found.fits or found.fails else 'nothing was measured'}; {runs}"


def searched(records: Sequence[Record]) -> dict[str, frontier.Search]:
    """By case id, the search that a case belongs to."""
    return {point.case_id: found for found in frontier.searches(records) for point in found.points}
