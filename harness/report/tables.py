"""Records as rows of cells: what the page, the terminal and the CSV all show. Statistics come from `summary` alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.report.words import (
    TIMES,
    Cell,
    count,
    digits,
    duration,
    gib,
    missing,
    ms,
    number,
    one_line,
    percent,
    plural,
)
from harness.schema import NOT_IDENTITY, ChainCase, Record, ServeCase, TrainCase
from harness.summary import MemoryRow, ServeSummary, Summary, TrainSummary, summarize

Case = TrainCase | ServeCase | ChainCase

NOISY = 0.10
"""Coefficient of variation of the step time from which a case is called noisy (our own threshold)."""
UNEVEN = 1.20
"""Ratio between ranks, of memory or of time before the first collective, from which it is named (our own threshold)."""
IN_COLUMNS = frozenset({"kind", "variant", "device", "method", "strategy", "devices", "seq_len", "concurrency",
                        "input_len", "output_len", "adapter", *NOT_IDENTITY})  # fmt: skip
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
    def serve(self) -> ServeSummary | None:
        """Serving statistics of a measured case; a failed one yields no number."""
        return self.summary.serve if self.summary and self.record.status == "measured" else None

    @property
    def why_missing(self) -> str:
        """Why this record has no number where it has none."""
        reasons = {"failed": "not measured: the case failed", "skipped": "not measured: the case was skipped"}
        return reasons.get(self.record.status, "not measured: the payload did not state it")


def entries(run: str, records: Sequence[Record], *, name_run: bool = False) -> list[Entry]:
    """The records of a run with their statistics, in the order given; `name_run` where another run stands beside it."""
    comparable = [_comparable(record.case) for record in records]
    usual = _usual_values(comparable)
    own = [one_line(run, 60)] if name_run else []
    return [
        Entry(run, record, summarize(record), ", ".join([*own, *_differs(mine, usual)]))
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
            found[(case.kind, name, case.variant if field == "lora_targets" else "")] = value
    return found


def _usual_values(found: Sequence[Comparable]) -> Comparable:
    """The most frequent value of each comparable field."""
    seen: dict[tuple[str, str, str], Counter[Any]] = {}
    for of_case in found:
        for key, value in of_case.items():
            seen.setdefault(key, Counter())[value] += 1
    return {key: values.most_common(1)[0][0] for key, values in seen.items()}


def _differs(mine: Comparable, usual: Comparable) -> list[str]:
    return [f"{key[1]} {_plain(value)}" for key, value in mine.items() if value != usual[key]]


def _plain(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


# ---------------------------------------------------------------- words for a case


def place(case: TrainCase) -> str:
    """Where a training case runs: `1 device`, `ddp`, its devices."""
    return f"{case.strategy} {TIMES} {case.devices}" if case.strategy != "none" else plural(case.devices, "device")


def label(case: Case) -> str:
    """A case in a few words, for a figure's legend or a list."""
    if isinstance(case, TrainCase):
        return f"{case.variant} {case.method}, seq {case.seq_len}, {place(case)}"
    if isinstance(case, ServeCase):
        model = "" if case.adapter == "none" else f" {case.adapter.split('/')[-1]}"
        return f"{case.variant}{model}, {case.concurrency} at once, {case.input_len} in, {case.output_len} out"
    return f"{case.variant} chain, {case.train.method}, {case.serve.adapter} served"


def full_label(entry: Entry) -> str:
    """The label, and the fields that tell this case from its neighbours."""
    return one_line(f"{label(entry.case)} ({entry.differs})" if entry.differs else label(entry.case), 120)


def verdict(entry: Entry) -> tuple[str, str]:
    """How a case ended: a tone (`good`, `note`, `bad`, `none`) and a sentence."""
    record = entry.record
    if record.status == "skipped":
        return "none", one_line(record.skip_reason or "skipped")
    if record.status == "failed":
        diagnosis = record.last.diagnosis if record.last else None
        return "bad", one_line(diagnosis.summary) if diagnosis else "failed, with no diagnosis"
    remarks = [*_train_remarks(entry), *_serve_remarks(entry)]
    return ("note", "; ".join(remarks)) if remarks else ("good", "ran as asked")


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


def number_label(entry: Entry) -> str:
    """What kind of number this record holds, and of which weights."""
    provenance = entry.record.provenance
    if provenance is None or entry.record.status != "measured":
        return "no number"
    return f"{provenance.number_kind}, {one_line(provenance.weights, 60)} weights"


# ---------------------------------------------------------------- columns


@dataclass(frozen=True)
class Column:
    """One column of a table of cases."""

    title: str
    hint: str
    of: Callable[[Entry], Cell]
    numeric: bool = True
    optional: bool = False
    """Left out where no row has a value: a CPU has no allocated memory."""


def _text(value: object) -> Cell:
    shown = one_line(str(value), 120)
    return Cell(shown, "", shown)


def _train(pick: Callable[[TrainSummary], Cell]) -> Callable[[Entry], Cell]:
    return lambda entry: pick(entry.train) if entry.train else missing(entry.why_missing)


def _serve(pick: Callable[[ServeSummary], Cell]) -> Callable[[Entry], Cell]:
    return lambda entry: pick(entry.serve) if entry.serve else missing(entry.why_missing)


def _training(pick: Callable[[TrainCase], Cell]) -> Callable[[Entry], Cell]:
    return lambda entry: pick(entry.training) if entry.training else missing()


def _serving(pick: Callable[[ServeCase], Cell]) -> Callable[[Entry], Cell]:
    return lambda entry: pick(entry.serving) if entry.serving else missing()


def _latency(which: str, at: str) -> Callable[[Entry], Cell]:
    return _serve(lambda serve: ms(getattr(getattr(serve.load, which), at)) if serve.load else missing())


def _peak(field: str) -> Callable[[Entry], Cell]:
    """The largest of one kind of memory over ranks and phases, and where it was."""

    def of(train: TrainSummary) -> Cell:
        row = peak_row(train.memory, field)
        if row is None:
            return missing(f"not measured: no rank stated {field.removesuffix('_bytes').replace('_', ' ')} memory")
        cell = gib(getattr(row, field))
        return cell._replace(why=f"{cell.why}, rank {row.rank}, phase {row.phase}")

    return _train(of)


def _cpu_growth(entry: Entry) -> Cell:
    """Of a CPU case alone: beside a GPU's memory the host's is another question."""
    on_cpu = entry.training is not None and entry.training.device == "cpu"
    return _peak("rss_growth_bytes")(entry) if on_cpu else missing("not shown for a case on a GPU")


def peak_row(rows: Iterable[MemoryRow], field: str) -> MemoryRow | None:
    """The row that is largest in `field`, `None` where no row has it."""
    known = [row for row in rows if getattr(row, field) is not None]
    return max(known, key=lambda row: int(getattr(row, field)), default=None)


def _tokens_per_s(train: TrainSummary) -> Cell:
    cell = number(train.tokens_per_s)
    return cell._replace(why=f"all devices together, n = {plural(train.steady_steps, 'steady step')}") \
        if train.tokens_per_s is not None else cell  # fmt: skip


def _output_rate(serve: ServeSummary) -> Cell:
    if serve.load is None or serve.load.output_tokens_per_s is None:
        return missing()
    return number(serve.load.output_tokens_per_s)._replace(why=f"n = {plural(serve.load.completed, 'request')}")


def _failed_requests(serve: ServeSummary) -> Cell:
    return Cell(f"{serve.load.failed} / {serve.load.requests}", "", serve.load.failed) if serve.load else missing()


def _smoke(serve: ServeSummary) -> Cell:
    if serve.smoke is None:
        return missing()
    wrong = [name.replace("_", " ") for name, right in serve.smoke.checks.items() if not right]
    return Cell("ok" if serve.smoke.ok else "failed: " + ", ".join(wrong), ", ".join(serve.smoke.checks),
                float(serve.smoke.ok))  # fmt: skip


_METHOD = Column("Method", "How the parameters are trained", _training(lambda case: _text(case.method)), False)
_STRATEGY = Column(
    "Strategy", "none, ddp or fsdp, and the devices it spans", _training(lambda case: _text(place(case))), False
)
_SEQ_LEN = Column("Seq len", "Tokens per sample", _training(lambda case: count(case.seq_len)))
_TOKENS = Column("Tokens/s", "Steady state, real tokens of all devices, warm-up left out", _train(_tokens_per_s))
_MEMORY = [
    Column("Alloc. GiB", "Peak allocated on one GPU, over ranks and phases", _peak("allocated_bytes"), optional=True),
    Column("Resvd. GiB", "Peak reserved on one GPU, over ranks and phases", _peak("reserved_bytes"), optional=True),
    Column("Device GiB", "Peak used on one GPU by all processes", _peak("device_used_bytes"), optional=True),
    Column("RSS+ GiB", "CPU: peak growth of one rank's resident memory after imports", _cpu_growth,
           optional=True),
]  # fmt: skip
_LATENCIES = [
    Column("TTFT ms p50", "Time to first token, ms, median", _latency("ttft", "p50_s")),
    Column("p95", "Time to first token, ms, 95th percentile", _latency("ttft", "p95_s")),
    Column("p99", "Time to first token, ms, 99th percentile", _latency("ttft", "p99_s")),
    Column("TPOT ms p50", "Time per output token, ms, median", _latency("tpot", "p50_s")),
    Column("p95", "Time per output token, ms, 95th percentile", _latency("tpot", "p95_s")),
    Column("p99", "Time per output token, ms, 99th percentile", _latency("tpot", "p99_s")),
    Column("ITL ms p50", "Inter-token latency, ms, median", _latency("itl", "p50_s")),
    Column("p95", "Inter-token latency, ms, 95th percentile", _latency("itl", "p95_s")),
    Column("p99", "Inter-token latency, ms, 99th percentile", _latency("itl", "p99_s")),
]
_OUTPUT = Column("Output tok/s", "Generated tokens per second, all requests together", _serve(_output_rate))
_FAILED = Column("Failed", "Failed requests of those sent; the others are n", _serve(_failed_requests))
_MODEL = Column("Served", "base (none), adapter or merged", _serving(lambda case: _text(case.adapter)), False)
_N = Column("n", "Steady steps behind the statistics", _train(lambda train: count(train.steady_steps)))

COLUMNS: dict[str, tuple[Column, ...]] = {
    "train": (
        _METHOD, _STRATEGY, _SEQ_LEN, _TOKENS,
        Column("Step p50", "Median step time of the slowest rank", _train(lambda t: duration(t.step_time_s.p50))),
        Column("p95", "95th percentile of the step time", _train(lambda t: duration(t.step_time_s.p95))),
        Column("CV", "Coefficient of variation of the step time: deviation over mean",
               _train(lambda t: percent(t.step_time_s.coefficient_of_variation, "not measured: needs two steps"))),
        _N, *_MEMORY,
    ),
    "serve": (
        _MODEL,
        Column("Conc.", "Requests at once", _serving(lambda case: count(case.concurrency))),
        Column("In / out", "Tokens of a prompt and of an answer",
               _serving(lambda case: Cell(f"{case.input_len} / {case.output_len}", "", case.input_len))),
        *_LATENCIES, _OUTPUT,
        _FAILED,
    ),
    "chain": (
        _METHOD, _STRATEGY, _SEQ_LEN, _MODEL, _TOKENS, *_MEMORY,
        Column("Merge", "Time to merge the adapter into the base",
               _train(lambda t: duration(t.merge_s, "nothing was merged"))),
        Column("Ready", "Server start until it answers", _serve(lambda s: duration(s.ready_s))),
        _LATENCIES[0], _LATENCIES[3], _OUTPUT, _FAILED,
        Column("Smoke", "One chat request: JSON, thinking policy, tokens, adapter differs from base",
               _serve(_smoke), False),
    ),
}  # fmt: skip

KINDS = {"train": "Training", "serve": "Serving", "chain": "Chains: train, save, reload, serve"}


def columns_of(kind: str, rows: Sequence[Entry]) -> list[Column]:
    """The columns of a kind that have something to show in these rows."""
    return [
        column
        for column in COLUMNS[kind]
        if not column.optional or any(column.of(row).sort is not None for row in rows)
    ]


def key_number(entry: Entry) -> Cell:
    """The one number of a case that a list shows."""
    if entry.record.status != "measured":
        return missing(entry.why_missing)
    if entry.train and entry.case.kind == "train":
        cell = number(entry.train.tokens_per_s)
        return cell._replace(text=f"{cell.text} tokens/s") if cell.sort is not None else cell
    cell = _output_rate(entry.serve) if entry.serve else missing(entry.why_missing)
    return cell._replace(text=f"{cell.text} output tok/s") if cell.sort is not None else cell


def counts(records: Sequence[Record]) -> dict[str, int]:
    """Planned cases by status, and apart from them those that a ladder or a search added."""
    planned = Counter(record.status for record in records if record.parent is None)
    added = sum(record.parent is not None for record in records)
    return {"planned": planned.total(), **{status: planned[status] for status in ("measured", "failed", "skipped")},
            "added": added}  # fmt: skip
