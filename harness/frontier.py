"""The largest value of one field that fits, found by halving the gap between what fits and what does not. Pure.

A plan's `Frontier` names a whole grid of cases; a search measures a few of them. Only what was measured is ever said to
fit, and only a failure for want of memory says that a value is too large.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.schema import AnyCase, Record, case_id

OUT_OF_MEMORY = frozenset({"oom_gpu_load", "oom_gpu_forward", "oom_gpu_backward", "oom_gpu_optimizer",
                           "oom_gpu_save_eval"})  # fmt: skip
"""Failure classes that say of a case on a GPU that it does not fit; contention says nothing of it."""
OF_A_SERVER = frozenset({"serve_kv_cache"})
"""And of a server: its cache does not hold one request of that length, or a Mamba state for each sequence."""
BELOW, ABOVE, OPEN = "frontier_below", "frontier_above", "frontier_open"
RULES = frozenset({BELOW, ABOVE, OPEN})
"""Rules of the skips that a search makes."""
State = Literal["fits", "too large", "unknown", "failed otherwise"]


@dataclass(frozen=True)
class Point:
    """One case of the grid."""

    case_id: str
    value: int
    record: Record | None = None

    @property
    def state(self) -> State:
        """What its record says of its size."""
        if self.record is None or self.record.skip_rule in RULES:
            return "unknown"
        if self.record.status == "measured":
            return "fits"
        return "too large" if self.failure in _too_large(self.record.case) else "failed otherwise"

    @property
    def failure(self) -> str:
        """The class of its failure; the rule of a skip."""
        if self.record is None:
            return ""
        last = self.record.last
        return last.diagnosis.failure_class if last and last.diagnosis else self.record.skip_rule or ""


def _too_large(case: AnyCase) -> frozenset[str]:
    more = {"oom_host"} if case.device == "cpu" else set()
    return OUT_OF_MEMORY | more | (OF_A_SERVER if case.kind == "serve" else set())


@dataclass(frozen=True)
class Search:
    """Where a search stands, its points by rising value."""

    axis: str
    points: tuple[Point, ...]

    @property
    def fits(self) -> Point | None:
        """The largest value that was measured."""
        return max((one for one in self.points if one.state == "fits"), key=_value, default=None)

    @property
    def fails(self) -> Point | None:
        """The smallest value above it that ran out of memory."""
        least = self.fits.value if self.fits else -1
        return min((one for one in self.points if one.state == "too large" and one.value > least), key=_value,
                   default=None)  # fmt: skip

    @property
    def tries(self) -> int:
        """How many of its points were run."""
        return sum(one.record is not None and one.record.status != "skipped" for one in self.points)

    @property
    def gap(self) -> tuple[Point, ...]:
        """The points between what fits and what does not."""
        low = self.fits.value if self.fits else -1
        return tuple(one for one in self.points if low < one.value and (not self.fails or one.value < self.fails.value))

    @property
    def obstacle(self) -> Point | None:
        """A point of the gap that failed otherwise, or could not run: nothing can be said across it."""
        return next((one for one in self.gap if one.state == "failed otherwise"), None)

    @property
    def next(self) -> Point | None:
        """The point to measure now: the middle of the gap; `None` where the search is over."""
        return self.gap[len(self.gap) // 2] if self.gap and not self.obstacle else None

    @property
    def idle(self) -> tuple[tuple[Point, str, str], ...]:
        """Points that need no measuring as it stands, each with the rule of its skip and the reason."""
        unknown = [one for one in self.points if one.state == "unknown"]
        return tuple((one, *why) for one in unknown if (why := self._idle(one)))

    def _idle(self, point: Point) -> tuple[str, str] | None:
        if self.fits and point.value < self.fits.value:
            return BELOW, f"Not measured: {self.axis} {self.fits.value:,} ran, and the search is for the largest."
        if self.fails and point.value > self.fails.value:
            reason = f"{self.axis} {self.fails.value:,} did not fit ({self.fails.failure})"
            return ABOVE, f"Not measured: {reason}, and this is larger."
        if blocked := self.obstacle:
            reason = f"{self.axis} {blocked.value:,} failed otherwise ({blocked.failure})"
            return OPEN, f"Not measured: {reason}, so the search cannot go on."
        return None


def _value(point: Point) -> int:
    return point.value


def search(axis: str, cases: Iterable[AnyCase], records: Mapping[str, Record]) -> Search:
    """The search over `cases`, from the records by case id that there are."""
    points = [Point(name, int(getattr(case, axis)), records.get(name)) for case in cases for name in (case_id(case),)]
    return Search(axis, tuple(sorted(points, key=_value)))


def searches(records: Sequence[Record]) -> list[Search]:
    """The searches that records tell of, in the order of their first record."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.frontier:
            groups.setdefault((record.frontier, group(record.case, record.frontier)), []).append(record)
    return [
        search(axis, (one.case for one in found), {one.case_id: one for one in found})
        for (axis, _), found in groups.items()
    ]


def is_answer(record: Record) -> bool:
    """Whether the record is of a search and says that its value is too large."""
    return record.frontier is not None and Point(record.case_id, 0, record).state == "too large"


def group(case: AnyCase, axis: str) -> str:
    """A name for what `case` is but for `axis`."""
    return case_id(case.model_copy(update={axis: 1}))
