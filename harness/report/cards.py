"""What fits which card: of each set-up the longest sample that ran, and the shortest above it that ran out of memory.

Only what ran is said to fit. A capped case speaks for a card of that size, any other for the GPU it ran on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

from harness.frontier import OUT_OF_MEMORY
from harness.report.setups import gpu_name, training_setup
from harness.report.words import GIB
from harness.schema import Record, TrainCase

Mark = TypeVar("Mark")


class Card(NamedTuple):
    """A size of card, or a GPU that was used whole."""

    gib: float
    name: str
    capped: bool


class Fit(NamedTuple, Generic[Mark]):
    """One set-up on one card, each case with the mark that its caller knows it by."""

    fits: tuple[int, Mark] | None
    fails: tuple[int, Mark] | None
    otherwise: tuple[int, Mark] | None
    """The shortest that failed for another reason, which says nothing of its size."""


def card_gib(record: Record) -> float | None:
    """Memory of one GPU as the case saw it: the cap, or what the driver says; `None` on a CPU."""
    cap = record.case.memory_cap_gib if isinstance(record.case, TrainCase) else None
    where = record.provenance
    return cap or (where.gpus[0].total_bytes / GIB if where and where.gpus else None)


def card(record: Record) -> Card | None:
    """The card that a training case on a GPU speaks for."""
    gib = card_gib(record)
    if gib is None or not isinstance(record.case, TrainCase) or record.case.device == "cpu":
        return None
    capped = record.case.memory_cap_gib is not None
    return Card(round(gib, 1), f"{gib:g} GiB" if capped else gpu_name(record), capped)


def what_fits(records: Iterable[tuple[Mark, Record]]) -> dict[str, dict[Card, Fit[Mark]]]:
    """By set-up and card what fits, in the order of the records; skipped cases say nothing."""
    found: dict[str, dict[Card, list[tuple[int, str, Mark]]]] = {}
    for mark, record in records:
        size = card(record)
        if size is not None and isinstance(record.case, TrainCase) and record.status != "skipped":
            of_setup = found.setdefault(training_setup(record.case), {})
            of_setup.setdefault(size, []).append((record.case.seq_len, _state(record), mark))
    return {name: {size: _fit(points) for size, points in of.items()} for name, of in found.items()}


def tells_of_size(of: Mapping[Card, Fit[Mark]]) -> bool:
    """Whether a set-up was tried under a cap, or ran out of memory anywhere."""
    return any(card.capped or fit.fails for card, fit in of.items())


def _state(record: Record) -> str:
    if record.status == "measured":
        return "fits"
    diagnosis = record.last.diagnosis if record.last else None
    return "too large" if diagnosis and diagnosis.failure_class in OUT_OF_MEMORY else "otherwise"


def _fit(points: list[tuple[int, str, Mark]]) -> Fit[Mark]:
    by_length = sorted(points, key=lambda point: point[0])
    fits = [(length, mark) for length, state, mark in by_length if state == "fits"]
    most = fits[-1][0] if fits else 0
    fails = [(length, mark) for length, state, mark in by_length if state == "too large" and length >= most]
    rest = [(length, mark) for length, state, mark in by_length if state == "otherwise" and length > most]
    return Fit(fits[-1] if fits else None, fails[0] if fails else None, rest[0] if rest else None)
