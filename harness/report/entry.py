"""One record with what every view of it says: its statistics, its label, its verdict, the kind of its numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.frontier import Search
from harness.report.chain import chains, searched
from harness.report.setups import place, plain
from harness.report.words import TIMES, digits, one_line, plural
from harness.schema import NOT_IDENTITY, AnyCase, ChainCase, ProbeCase, Record, ServeCase, TrainCase
from harness.summary import MemoryRow, ServeSummary, Summary, TrainSummary, summarize
from harness.summary.probes import ProbeSummary

Case = AnyCase

NOISY = 0.10
"""Coefficient of variation of the step time from which a case is called noisy (our own threshold)."""
UNEVEN = 1.20
"""Ratio between ranks, of memory or of time before the first collective, from which it is named (our own threshold)."""
IN_COLUMNS = frozenset({"kind", "variant", "device", "method", "strategy", "devices", "nodes", "seq_len", "concurrency",
                        "input_len", "output_len", "adapter", "interface", "p2p", "sizes_bytes",
                        *NOT_IDENTITY})  # fmt: skip
"""Case fields that the tables show, or that follow from one they show."""


@dataclass(frozen=True)
class ReportRun:
    """A run as a report needs it."""

    name: str
    created: float
    """Unix seconds."""
    records: tuple[Record, ...]
    source: str
    """The run directory, for relative links to its records and logs."""


@dataclass(frozen=True)
class Entry:
    """One record with all that its row needs."""

    run: str
    record: Record
    summary: Summary | None
    differs: str
    """Fields that stand in no column and are not what most cases of its kind and run have, as text."""
    beside: str = ""
    """The run's name, where another run stands beside it."""
    chain: tuple[Record, ...] = ()
    """All records of the ladder that the case stands on, the planned case first."""
    search: Search | None = None
    """The search for the largest value that fits, where the case belongs to one."""

    @property
    def case(self) -> Case:
        """What was asked."""
        return self.record.case

    @property
    def training(self) -> TrainCase | None:
        """The training half, if the case has one."""
        case = self.record.case
        return case.train if isinstance(case, ChainCase) else case if isinstance(case, TrainCase) else None

    @property
    def serving(self) -> ServeCase | None:
        """The serving half, if the case has one."""
        case = self.record.case
        return case.serve if isinstance(case, ChainCase) else case if isinstance(case, ServeCase) else None

    @property
    def train(self) -> TrainSummary | None:
        """Training statistics of a measured case; a failed one yields no number."""
        return self.summary.train if self.summary and self.record.status == "measured" else None

    @property
    def failure_class(self) -> str:
        """What a failed case failed of; empty for any other."""
        last = self.record.last if self.record.status == "failed" else None
        return last.diagnosis.failure_class if last and last.diagnosis else ""

    @property
    def cap_gib(self) -> float | None:
        """The size that a larger GPU was held to."""
        return self.training.memory_cap_gib if self.training else None

    @property
    def serve(self) -> ServeSummary | None:
        """Serving statistics of a measured case; a failed one yields no number."""
        return self.summary.serve if self.summary and self.record.status == "measured" else None

    @property
    def probe(self) -> ProbeSummary | None:
        """Statistics of a measured probe; a failed one yields no number."""
        return self.summary.probe if self.summary and self.record.status == "measured" else None

    @property
    def subject(self) -> str:
        """What the case is about: its variant, or for a probe the ranks that talk."""
        return talkers(self.case) if isinstance(self.case, ProbeCase) else self.case.variant

    @property
    def why_missing(self) -> str:
        """Why this record has no number where it has none."""
        reasons = {"failed": "not measured: the case failed", "skipped": "not measured: the case was skipped"}
        return reasons.get(self.record.status, "not measured: the payload did not state it")


def entries(run: str, records: Sequence[Record], *, name_run: bool = False) -> list[Entry]:
    """The records of a run with their statistics, in the order given; `name_run` where another run stands beside it."""
    comparable = [_comparable(record.case) for record in records]
    usual = _usual_values(comparable)
    beside = one_line(run, 60) if name_run else ""
    ladders, found = chains(records), searched(records)
    return [
        Entry(
            run,
            record,
            summarize(record),
            ", ".join(_differs(mine, usual)),
            beside,
            ladders.get(record.case_id, ()),
            found.get(record.case_id),
        )
        for record, mine in zip(records, comparable, strict=True)
    ]


def _fields(case: Case) -> dict[str, Any]:
    """The fields of a case; a chain's halves carry `train.` and `serve.` in front."""
    if not isinstance(case, ChainCase):
        return case.model_dump()
    halves = {"train": case.train.model_dump(), "serve": case.serve.model_dump()}
    both = {f"{half}.{name}": value for half, fields in halves.items() for name, value in fields.items()}
    return {"kind": "chain", **both}


Comparable = dict[tuple[str, str, str], Any]
"""What may tell a case from its neighbours: kind, field and, for targets that follow from it, variant -> value."""


def _comparable(case: Case) -> Comparable:
    fields, found = _fields(case), Comparable()
    for name, value in fields.items():
        field = name.split(".")[-1]
        method = fields.get(name.removesuffix(field) + "method")
        if field not in IN_COLUMNS and not (field.startswith("lora") and method == "full"):
            found[(case.kind, name, _variant(case) if field == "lora_targets" else "")] = value
    return found


def _variant(case: Case) -> str:
    return "" if isinstance(case, ProbeCase) else case.variant


def _usual_values(found: Sequence[Comparable]) -> Comparable:
    """The most frequent value of each comparable field."""
    seen: dict[tuple[str, str, str], Counter[Any]] = {}
    for of_case in found:
        for key, value in of_case.items():
            seen.setdefault(key, Counter())[value] += 1
    return {key: values.most_common(1)[0][0] for key, values in seen.items()}


def _differs(mine: Comparable, usual: Comparable) -> list[str]:
    return [f"{key[1]} {plain(value)}" for key, value in mine.items() if value != usual[key]]


# ---------------------------------------------------------------- words for a case


def label(case: Case) -> str:
    """A case in a few words, for a figure's legend or a list."""
    if isinstance(case, TrainCase):
        return f"{case.variant} {case.method}, seq {case.seq_len}, {place(case)}"
    if isinstance(case, ServeCase):
        model = "" if case.adapter == "none" else f" {case.adapter.split('/')[-1]}"
        return f"{case.variant}{model}, {case.concurrency} at once, {case.input_len} in, {case.output_len} out"
    if isinstance(case, ProbeCase):
        return _probe_label(case)
    return f"{case.variant} chain, {case.train.method}, {case.serve.adapter} served"


def talkers(case: ProbeCase) -> str:
    """Which ranks a probe lets talk: how many, and over what."""
    nodes = f" on {case.nodes} nodes" if case.nodes > 1 else ""
    return f"{'gloo' if case.device == 'cpu' else 'NCCL'} {TIMES} {case.devices}{nodes}"


def _probe_label(case: ProbeCase) -> str:
    marks = [f"over {case.interface}" if case.interface else "", "" if case.p2p else "P2P off",
             "debug" if case.debug else ""]  # fmt: skip
    return ", ".join(part for part in (f"all-reduce probe, {talkers(case)}", *marks) if part)


def full_label(entry: Entry) -> str:
    """The label, and the fields that tell this case from its neighbours."""
    apart = ", ".join(part for part in (entry.beside, entry.differs) if part)
    return one_line(f"{label(entry.case)} ({apart})" if apart else label(entry.case), 120)


def verdict(entry: Entry) -> tuple[str, str]:
    """How a case ended: a tone (`good`, `note`, `bad`, `none`) and a sentence."""
    record = entry.record
    if record.status == "skipped":
        return "none", one_line(record.skip_reason or "skipped")
    if record.status == "failed":
        diagnosis = record.last.diagnosis if record.last else None
        return "bad", one_line(diagnosis.summary) if diagnosis else "failed, with no diagnosis"
    remarks = [*_train_remarks(entry), *_serve_remarks(entry), *_probe_remarks(entry)]
    if entry.cap_gib is not None:
        return ("note" if remarks else "good"), "; ".join([fits(entry.cap_gib), *remarks])
    return ("note", "; ".join(remarks)) if remarks else ("good", "ran as asked")


def fits(cap_gib: float) -> str:
    """What a measured case under a cap says."""
    return f"fits in {cap_gib:g} GiB"


def _train_remarks(entry: Entry) -> list[str]:
    train, remarks = entry.train, []
    if train is None:
        return []
    variation = train.step_time_s.coefficient_of_variation
    if variation is not None and variation >= NOISY:
        remarks.append(f"noisy steps (CV {digits(variation * 100)} %)")
    if train.slowest_rank_ratio is not None and train.slowest_rank_ratio >= UNEVEN:
        remarks.append(
            f"rank {train.slowest_rank} is slow ({TIMES} {train.slowest_rank_ratio:.2f} before the collective)"
        )
    if train.memory_imbalance is not None and train.memory_imbalance >= UNEVEN:
        remarks.append(f"uneven memory between ranks ({TIMES} {train.memory_imbalance:.2f})")
    return remarks


def _serve_remarks(entry: Entry) -> list[str]:
    serve, remarks = entry.serve, []
    if serve is None:
        return []
    if serve.load and serve.load.failed:
        remarks.append(f"{serve.load.failed} of {plural(serve.load.requests, 'request')} failed")
    if serve.smoke and not serve.smoke.ok:
        remarks.append("the smoke request failed")
    return remarks


def _probe_remarks(entry: Entry) -> list[str]:
    probe = entry.probe
    if probe is None or probe.late_rank is None:
        return []
    return [f"rank {probe.late_rank} comes late ({TIMES} {probe.late_ratio:.2f} before the collective)"]


def number_label(entry: Entry) -> str:
    """What kind of number this record holds, and of which weights."""
    provenance = entry.record.provenance
    if provenance is None or entry.record.status != "measured":
        return "no number"
    kind = provenance.number_kind if entry.cap_gib is None else f"capped at {entry.cap_gib:g} GiB"
    return kind if isinstance(entry.case, ProbeCase) else f"{kind}, {one_line(provenance.weights, 60)} weights"


def counts(records: Sequence[Record]) -> dict[str, int]:
    """Planned cases by status, and apart from them those that a ladder or a search added."""
    planned = Counter(record.status for record in records if record.parent is None)
    added = sum(record.parent is not None for record in records)
    return {"planned": planned.total(), **{status: planned[status] for status in ("measured", "failed", "skipped")},
            "added": added}  # fmt: skip


def peak_row(rows: Iterable[MemoryRow], field: str) -> MemoryRow | None:
    """The row that is largest in `field`, `None` where no row has it."""
    known = [row for row in rows if getattr(row, field) is not None]
    return max(known, key=lambda row: int(getattr(row, field)), default=None)
