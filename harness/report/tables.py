"""Records as rows of cells: what the page and the terminal both show. Statistics come from `summary` alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.report import probes
from harness.report.entry import Entry, fits, peak_row
from harness.report.setups import place
from harness.report.words import Cell, count, digits, duration, gib, missing, ms, number, one_line, percent, plural
from harness.schema import ServeCase, TrainCase
from harness.summary import ServeSummary, TrainSummary


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
    def of(entry: Entry) -> Cell:
        cell = pick(entry.train) if entry.train else missing(entry.why_missing)
        return cell._replace(why=entry.train.no_speed) if cell.sort is None and entry.train and entry.train.no_speed \
            else cell  # fmt: skip

    return of


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


def _tokens_per_s(train: TrainSummary) -> Cell:
    cell = number(train.tokens_per_s)
    return cell._replace(why=f"all devices together, n = {plural(train.throughput_n, 'steady step')}") \
        if train.tokens_per_s is not None else cell  # fmt: skip


def joules(half: TrainSummary | ServeSummary) -> Cell:
    """Joules per token, and the power behind it."""
    gpu = half.gpu
    if gpu is None or gpu.joules_per_token is None:
        return missing("not measured: no telemetry of every GPU over the measured time")
    return number(gpu.joules_per_token)._replace(
        why=f"{digits(gpu.power_mean_w or 0)} W, all GPUs, by {gpu.energy_from}"
    )


def mfu(train: TrainSummary) -> Cell:
    """How much of the GPU's peak the training used, or why that is not known."""
    found = train.utilisation
    if found is None or found.mfu is None:
        return missing(found.why_not if found and found.why_not else "not measured")
    peak = f"of {found.gpu}'s {digits((found.peak_flops_per_s or 0) / 1e12)} TFLOP/s (dense bf16, data sheet)"
    work = f"{digits(found.model_flops_per_token / 1e9)} GFLOP a token in samples of {found.mean_tokens:,}"
    return percent(found.mfu)._replace(why=f"{peak}, {work}")


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
        _N,
        Column("MFU", "Model FLOPs utilisation: what the method needs, without recomputation, over the GPU's peak",
               _train(mfu), optional=True),
        Column("J/token", "Energy of all GPUs over the real tokens of the steady steps", _train(joules), optional=True),
        *_MEMORY,
    ),
    "serve": (
        _MODEL,
        Column("Conc.", "Requests at once", _serving(lambda case: count(case.concurrency))),
        Column("In / out", "Tokens of a prompt and of an answer",
               _serving(lambda case: Cell(f"{case.input_len} / {case.output_len}", "", case.input_len))),
        *_LATENCIES, _OUTPUT,
        Column("J/token", "Energy of all GPUs under the load over the generated tokens", _serve(joules), optional=True),
        _FAILED,
    ),
    "probe": (
        Column("Sizes", "Sizes of all-reduce that were timed", probes.of_probe(lambda p: count(len(p.sizes)))),
        Column("Bus GB/s", "Largest bus bandwidth over the sizes: bytes over median time, times 2(n-1)/n",
               probes.of_probe(probes.bus)),
        Column("Latency", "Median time of the smallest all-reduce", probes.of_probe(lambda p: duration(p.latency_s))),
        Column("Connected by", "As NCCL's log says, or over which interface", probes.transport, False),
        Column("Interface", "The one that was asked for",
               probes.of_case(lambda case: _text(case.interface) if case.interface else missing("left open")), False),
        Column("P2P", "May GPUs copy to each other directly",
               probes.of_case(lambda case: missing("a CPU has none") if case.device == "cpu" else
                              _text("on" if case.p2p else "off")), False, True),
        Column("Late rank", "The rank whose work before the collective takes 1.2 times the median, or more",
               probes.of_probe(lambda p: missing("none") if p.late_rank is None else _text(p.late_rank)), False),
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

KINDS = {"train": "Training", "serve": "Serving", "chain": "Chains: train, save, reload, serve",
         "probe": "Probes of the communication between ranks"}  # fmt: skip


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
    if entry.case.kind == "probe":
        return probes.key_number(entry)
    if entry.cap_gib is not None:
        return Cell(fits(entry.cap_gib), "", entry.cap_gib)
    if entry.train and entry.case.kind == "train":
        cell = number(entry.train.tokens_per_s)
        return cell._replace(text=f"{cell.text} tokens/s") if cell.sort is not None else cell
    cell = _output_rate(entry.serve) if entry.serve else missing(entry.why_missing)
    return cell._replace(text=f"{cell.text} output tok/s") if cell.sort is not None else cell
