"""The largest value of one field that fits, found by halving the gap between what fits and what does not. Pure.

A plan's `Frontier` names a whole grid of cases; a search measures a few of them. Only what was measured is ever said to
fit, and only a failure for want of memory says that a value is too large. Where peaks were measured, a line through
them says which part of the gap to look at first; no claim follows from it, and `most_runs` holds whatever it says.
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
UNUSED = 0.04
"""Of what PyTorch may hold, the share that a case may leave unused when it runs out: kernels' code that comes later,
gaps between blocks. Our own estimate: `tests/bench_frontier.py` shows what follows from it, right or wrong."""
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
        """The point to measure now; `None` where the search is over."""
        return self.gap[self._chosen()] if self.gap and not self.obstacle else None

    @property
    def most_runs(self) -> int:
        """How many runs it may take in all."""
        return most_runs(len(self.points))

    def _chosen(self) -> int:
        """The place in the gap to measure: where the peaks point, as near as `most_runs` allows, else the middle."""
        size = len(self.gap)
        left = self.most_runs - self.tries - 1
        affordable = [at for at in range(size) if max(at, size - 1 - at).bit_length() <= left]
        wanted = guess(self.points, self.gap)
        middle = size // 2
        return min(affordable, key=lambda at: abs(at - wanted)) if affordable and wanted is not None else middle

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


# ---------------------------------------------------------------- where to look first


def guess(points: Sequence[Point], gap: Sequence[Point]) -> int | None:
    """Where in `gap` the largest value that fits may lie, from measured peaks; `None` where they do not say.

    The peaks of the two largest values that fit, or of one and of its weights alone, give a line over the values. What
    PyTorch was allowed is the most that may be held; somewhat less is used, so the border is likely where the line lies
    between the two: the middle of those places. A server takes all it may whatever is asked: its peaks say nothing.
    """
    fits = [(one.value, one.record) for one in points if one.state == "fits" and one.record]
    fits = [(value, record) for value, record in fits if record.case.kind == "train"]
    peaks = [(value, peak) for value, record in fits if (peak := peak_bytes(record))]
    room = min((found for _, record in fits if (found := room_bytes(record))), default=None)
    if len(peaks) == 1:
        peaks = [(0, loaded) for _, record in fits if (loaded := peak_bytes(record, "load"))][:1] + peaks
    if room is None or len(peaks) < 2:
        return None
    (one, low), (other, high) = peaks[-2:]
    each = (high - low) / (other - one)
    border = [high + each * (point.value - other) for point in gap]
    below, above = [float("-inf"), *border], [*border, float("inf")]
    likely = [at for at in range(len(border) + 1) if below[at] <= room and above[at] > room * (1 - UNUSED)]
    # Place 0 is the border below the whole gap: to see it, the gap's first value is measured.
    return max(likely[len(likely) // 2] - 1, 0) if likely and each > 0 else None


def peak_bytes(record: Record, phase: str | None = None) -> int | None:
    """The most that tensors held on one GPU, in all phases or in one."""
    ranks = record.last.observation.ranks if record.last else ()
    found = [memory.peak_allocated_bytes or 0 for rank in ranks for memory in rank.memory
             if phase in (None, memory.phase)]  # fmt: skip
    return max(found, default=0) or None


def room_bytes(record: Record) -> int | None:
    """What PyTorch was allowed on each GPU, or else what the smallest GPU has."""
    train = record.last.observation.train if record.last else None
    cap = train.proof.get("memory_cap") if train and train.proof else None
    allowed = cap.get("allowed_bytes") if isinstance(cap, dict) else None
    if isinstance(allowed, int):
        return allowed
    gpus = record.provenance.gpus if record.provenance else ()
    return min((gpu.total_bytes for gpu in gpus), default=None) if record.case.device == "cuda" else None


def most_runs(points: int) -> int:
    """How many runs a search of so many points may take: as many as halving, or one more within a third of them."""
    halving = points.bit_length()  # finds one of `points` + 1 answers
    return halving + (3 * (halving + 1) <= points)


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
