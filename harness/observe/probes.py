"""What the lines of a probe come to: columns by rank and size, thinned where a record would grow too large."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from harness.observe.lines import MAX_NOTES, RankSeen, Seen
from harness.schema import ProbeArrival, ProbeCheck, ProbeObservation, ProbeSeries

MAX_VALUES = 3000
"""Times that a record keeps of all ranks and sizes together: about 75 kB of JSON with one value a line."""
MAX_SERIES = 192
"""Columns of times, each of one rank and size, that a record keeps; ranks beyond it are in the event files alone."""
LEAST_TIMES = 3
_Item = TypeVar("_Item")


def probe(seen: Seen) -> ProbeObservation | None:
    """The probe that these ranks ran; `None` where none left a line. Says in a note what is left out."""
    if not seen.ranks:
        return None
    sizes = max(1, *(len(rank.series) for rank in seen.ranks.values()))
    ranks = _spread([rank for _, rank in sorted(seen.ranks.items())], max(2, MAX_SERIES // sizes))
    if len(ranks) < len(seen.ranks):
        seen.notes = {f"The record keeps {len(ranks)} of {len(seen.ranks)} ranks' times.": None, **seen.notes}
    proof = seen.facts.get("proof")
    backend = proof.get("backend") if isinstance(proof, dict) else None
    return ProbeObservation(
        backend=backend if isinstance(backend, str) else None,
        timer=seen.facts.get("timer"),
        proof=proof if isinstance(proof, dict) else {},
        proof_mismatches=tuple(seen.mismatches)[:MAX_NOTES],
        phases_s=seen.phases_s,
        checks=_checks(seen, ranks),
        series=_series(seen, ranks),
        arrivals=tuple(_thin_arrival(rank.arrival, len(ranks)) for rank in ranks if rank.arrival),
    )


def _checks(seen: Seen, ranks: Sequence[RankSeen]) -> tuple[ProbeCheck, ...]:
    """Those of the ranks that are kept, and every one that failed."""
    kept = {rank.rank for rank in ranks}
    found = [check for _, rank in sorted(seen.ranks.items()) for check in rank.checks]
    return tuple(check for check in found if not check.ok or check.rank in kept)[: MAX_SERIES * 2]


def _series(seen: Seen, ranks: Sequence[RankSeen]) -> tuple[ProbeSeries, ...]:
    """Every kept rank's times; the same all-reduces of each, evenly spaced where they are too many."""
    found = [series for rank in ranks for series in rank.series.values()]
    most = max(LEAST_TIMES, MAX_VALUES // max(1, len(found)))
    if any(len(one.time_s) > most for one in found):
        note = f"The record keeps up to {most} times of each size and rank, evenly spaced."
        seen.notes = {note: None, **seen.notes}
    return tuple(one.model_copy(update={"time_s": tuple(_spread(one.time_s, most))}) for one in found)


def _thin_arrival(arrival: ProbeArrival, ranks: int) -> ProbeArrival:
    most = max(LEAST_TIMES, MAX_VALUES // 4 // ranks)
    return arrival.model_copy(
        update={name: tuple(_spread(getattr(arrival, name), most)) for name in ("work_s", "wait_s")}
    )


def _spread(items: Sequence[_Item], most: int) -> Sequence[_Item]:
    """At most `most` of the items, the first and the last among them; `most` is at least 2."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]
