"""Two runs side by side: equal cases with the ratio of their numbers and how far repeats spread."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.report.entry import Case, Entry, ReportRun, entries, label, peak_row
from harness.report.words import GIB, MISSING, Cell, clean, digits, one_line
from harness.schema import ChainCase, LoadPoint, case_id
from harness.summary import Spread, TrainSummary, spread

NEWLY_FAILED = "newly failed"


@dataclass(frozen=True)
class Measure:
    """A number that runs are compared by."""

    name: str
    unit: str
    higher_is_better: bool
    of: Callable[[Entry], float | None]


@dataclass(frozen=True)
class Comparison:
    """One measure of one case, repeats grouped, in both runs."""

    case_id: str
    """Of the case without its repeat index."""
    label: str
    measure: Measure
    base: Spread
    other: Spread
    base_status: str
    other_status: str

    @property
    def ratio(self) -> float | None:
        """The other run's median over the base's."""
        if not self.base.p50 or self.other.p50 is None:
            return None
        return self.other.p50 / self.base.p50

    @property
    def judgement(self) -> str:
        """What the ratio may be read as; two single values have no spread to judge by."""
        low, high = (self.base.min, self.base.max), (self.other.min, self.other.max)
        if status := _status_change(self.base_status, self.other_status):
            return status
        if None in low or None in high:
            return "not comparable"
        if self.base.n < 2 or self.other.n < 2:
            return "spread unknown (n = 1)"
        if (self.base.min or 0) <= (self.other.max or 0) and (self.other.min or 0) <= (self.base.max or 0):
            return "within the spread"
        grew = (self.other.p50 or 0) > (self.base.p50 or 0)
        return "better" if grew == self.measure.higher_is_better else "worse"


def _status_change(base: str, other: str) -> str:
    """What the statuses of a case's repeats say, where they say more than its numbers; skips say nothing."""
    failed = ("failed" in base, "failed" in other)
    if "skipped" in base or "skipped" in other or failed == (False, False):
        return ""
    return {(False, True): NEWLY_FAILED, (True, False): "no longer fails"}.get(failed, "fails in both")


@dataclass(frozen=True)
class Compared:
    """Two runs, case by case."""

    base: str
    other: str
    rows: tuple[Comparison, ...]
    only_base: tuple[str, ...]
    """Case ids that stand in the base alone."""
    only_other: tuple[str, ...]


def _load(entry: Entry) -> LoadPoint | None:
    return entry.serve.load if entry.serve else None


def _train(pick: Callable[[TrainSummary], float | None]) -> Callable[[Entry], float | None]:
    return lambda entry: pick(entry.train) if entry.train else None


def _serve(pick: Callable[[LoadPoint], float | None]) -> Callable[[Entry], float | None]:
    def of(entry: Entry) -> float | None:
        load = _load(entry)
        return pick(load) if load else None

    return of


def _peak_gib(field: str) -> Callable[[TrainSummary], float | None]:
    def of(train: TrainSummary) -> float | None:
        row = peak_row(train.memory, field)
        return int(getattr(row, field)) / GIB if row else None

    return of


def _growth_gib(entry: Entry) -> float | None:
    """Of a CPU case alone: beside a GPU's memory the host's is another question."""
    return _train(_peak_gib("rss_growth_bytes"))(entry) if entry.case.device == "cpu" else None


def _joules(entry: Entry) -> float | None:
    halves = [half.gpu for half in (entry.train, entry.serve) if half and half.gpu]
    return halves[0].joules_per_token if len(halves) == 1 else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _gb(bytes_per_s: float | None) -> float | None:
    return None if bytes_per_s is None else bytes_per_s / 1e9


MEASURES = (
    Measure("training throughput", "tokens/s", True, _train(lambda train: train.tokens_per_s)),
    Measure("step time p50", "s", False, _train(lambda train: train.step_time_s.p50)),
    Measure("peak allocated", "GiB", False, _train(_peak_gib("allocated_bytes"))),
    Measure("peak reserved", "GiB", False, _train(_peak_gib("reserved_bytes"))),
    Measure("peak resident growth", "GiB", False, _growth_gib),
    Measure("output throughput", "tokens/s", True, _serve(lambda load: load.output_tokens_per_s)),
    Measure("TTFT p50", "ms", False, _serve(lambda load: _ms(load.ttft.p50_s))),
    Measure("TPOT p50", "ms", False, _serve(lambda load: _ms(load.tpot.p50_s))),
    Measure("bus bandwidth", "GB/s", True, lambda entry: _gb(entry.probe.bus_bytes_per_s) if entry.probe else None),
    Measure("all-reduce latency", "ms", False, lambda entry: _ms(entry.probe.latency_s) if entry.probe else None),
    Measure("energy", "J/token", False, _joules),
    Measure("failed requests", "requests", False, _serve(lambda load: load.failed)),
)


def without_repeat(case: Case) -> str:
    """The id of a case as if it were its first repetition."""
    if isinstance(case, ChainCase):
        halves = {"train": case.train.model_copy(update={"repeat": 0}),
                  "serve": case.serve.model_copy(update={"repeat": 0})}  # fmt: skip
        return case_id(case.model_copy(update=halves))
    return case_id(case.model_copy(update={"repeat": 0}))


def compare(base: Sequence[Entry], other: Sequence[Entry], names: tuple[str, str]) -> Compared:
    """Two runs side by side, in the order of the base."""
    left, right = _by_case(base), _by_case(other)
    rows = [row for name in left if name in right for row in _rows(name, left[name], right[name])]
    return Compared(
        *names,
        tuple(rows),
        only_base=tuple(entry.record.case_id for name, found in left.items() if name not in right for entry in found),
        only_other=tuple(entry.record.case_id for name, found in right.items() if name not in left for entry in found),
    )


def _by_case(found: Sequence[Entry]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in found:
        groups.setdefault(without_repeat(entry.case), []).append(entry)
    return groups


def _label(entry: Entry) -> str:
    """The label of a case's repeats together."""
    apart = [part for part in entry.differs.split(", ") if part and "repeat" not in part]
    return one_line(f"{label(entry.case)} ({', '.join(apart)})" if apart else label(entry.case))


def _status(found: Sequence[Entry]) -> str:
    kinds = sorted({entry.record.status for entry in found})
    return kinds[0] if len(kinds) == 1 else ", ".join(kinds)


def _rows(name: str, left: Sequence[Entry], right: Sequence[Entry]) -> list[Comparison]:
    """A row for each measure that either run has; one without numbers where neither has any."""
    found, name_of_case = [], _label(left[0])
    for measure in MEASURES:
        base, other = (spread([v for e in side if (v := measure.of(e)) is not None]) for side in (left, right))
        if (base.n or other.n) and not (base.max == 0 and other.max == 0):
            found.append(Comparison(name, name_of_case, measure, base, other,
                                    _status(left), _status(right)))  # fmt: skip
    status = Measure("status", "", True, lambda entry: None)
    return found or [Comparison(name, name_of_case, status, Spread(), Spread(),
                                _status(left), _status(right))]  # fmt: skip


def side(of: Spread, status: str) -> Cell:
    """One run's half of a row: median, range and n, or the status that explains their absence."""
    if of.p50 is None or of.min is None or of.max is None:
        return Cell(MISSING if status == "measured" else status, f"not measured: {status}")
    text = digits(of.p50) if of.n == 1 else f"{digits(of.p50)} ({digits(of.min)} to {digits(of.max)})"
    return Cell(f"{text}, n = {of.n}", "", of.p50)


HEAD = ("case_id", "case", "measure", "unit", "base_run", "base_status", "base_n", "base_median", "base_min",
        "base_max", "other_run", "other_status", "other_n", "other_median", "other_min", "other_max", "ratio",
        "judgement")  # fmt: skip


def comparison_csv(base: ReportRun, other: ReportRun) -> str:
    """Two runs as CSV: a row per case and measure, then the ids that stand in one run alone."""
    found = compare(entries(base.name, base.records), entries(other.name, other.records), (base.name, other.name))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEAD)
    for row in found.rows:
        writer.writerow([_plain(value) for value in _csv_row(found, row)])
    for names, status in ((found.only_base, (found.base, "present", found.other, "absent")),
                          (found.only_other, (found.base, "absent", found.other, "present"))):  # fmt: skip
        for name in names:
            values = [name, "", "", "", *status[:2], *[""] * 4, *status[2:], *[""] * 6]
            writer.writerow([_plain(value) for value in values])
    return out.getvalue()


def _csv_row(found: Compared, row: Comparison) -> list[object]:
    halves = [[name, status, of.n, of.p50, of.min, of.max] for name, status, of in
              ((found.base, row.base_status, row.base), (found.other, row.other_status, row.other))]  # fmt: skip
    what = [row.case_id, row.label, row.measure.name, row.measure.unit]
    return [*what, *halves[0], *halves[1], row.ratio, row.judgement]


def _plain(value: object) -> object:
    """Text that a spreadsheet does not take for a formula; numbers in full, nothing as nothing."""
    if not isinstance(value, str):
        return "" if value is None else value
    text = clean(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text
