"""The README's tables of what was measured, made from the records under reports/.

usage: .venv/bin/python tools/results_table.py [--write]   print the tables, or put them into README.md
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import catalog
from harness.schema import ChainCase, ProbeCase, Record, ServeCase, TrainCase
from harness.store import Run
from harness.summary import summarize

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: made by tools/results_table.py -->", "<!-- end of results -->"
GIB = 1024**3


@dataclass(frozen=True)
class Measured:
    """A record and where it lies."""

    record: Record
    path: Path

    @property
    def gpu(self) -> str:
        """The first GPU's name without its maker."""
        where = self.record.provenance
        return where.gpus[0].name.removeprefix("NVIDIA ") if where and where.gpus else "?"


@dataclass(frozen=True)
class Table:
    """One kind of case: which records belong, their order, and their cells."""

    title: str
    columns: tuple[str, ...]
    """A trailing colon: right-aligned."""
    belongs: Callable[[Record], bool]
    order: Callable[[Measured], tuple[object, ...]]
    cells: Callable[[Measured], Sequence[str]]

    def text(self, found: Iterable[Measured]) -> list[str]:
        """The lines of this table; none where nothing was measured."""
        mine = sorted((one for one in found if self.belongs(one.record)), key=self.order)
        rule = "".join("---:|" if name.endswith(":") else "---|" for name in self.columns)
        head = ["", f"**{self.title}**", "", "| " + " | ".join(n.rstrip(":") for n in self.columns) + " | |"]
        links = [f"[record]({os.path.relpath(one.path, ROOT)})" for one in mine]
        rows = ["| " + " | ".join([*self.cells(one), link]) + " |" for one, link in zip(mine, links, strict=True)]
        return [*head, f"|{rule}---|", *rows] if mine else []


def measured(folder: Path) -> list[Measured]:
    """The records under `folder` of what ran on a GPU."""
    runs = [Run(path.parent) for path in sorted(folder.glob("*/run.json"))]
    each = [Measured(record, run.record_path(record.case_id)) for run in runs for record in run.records()]
    return [one for one in each if one.record.case.device == "cuda" and one.record.status != "skipped"]


def text(folder: Path) -> str:
    """The tables as they stand in README.md, their marks included."""
    found = measured(folder)
    return "\n".join([BEGIN, *(line for table in TABLES for line in table.text(found)), "", END])


def placed(readme: str, new: str) -> str:
    """`readme` with what is between the marks replaced."""
    before, rest = readme.split(BEGIN, 1)
    return before + new + rest.split(END, 1)[1]


def _variant(name: str) -> int:
    return list(catalog.variants()).index(name)


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def _gib(value: float | None) -> str:
    return _number(value, ".1f", 1 / GIB)


def _failure(record: Record) -> str:
    diagnosis = record.last.diagnosis if record.last else None
    return diagnosis.failure_class if diagnosis else "failed"


# ---------------------------------------------------------------- training


def _train_order(one: Measured) -> tuple[object, ...]:
    case = one.record.case
    assert isinstance(case, TrainCase)
    cap = case.memory_cap_gib or math.inf
    options = (not case.activation_checkpointing, case.micro_batch, case.grad_accum, case.optimizer)
    return (_variant(case.variant), case.method, case.devices, case.strategy, *options, case.seq_len, cap, one.gpu)


def _train_cells(one: Measured) -> tuple[str, ...]:
    case = one.record.case
    assert isinstance(case, TrainCase)
    place = "one" if case.strategy == "none" else f"{case.strategy} x {case.devices}"
    gpu = f"{one.gpu} as {case.memory_cap_gib:g} GiB" if case.memory_cap_gib else one.gpu
    method = case.method if case.activation_checkpointing else f"{case.method}, no checkpointing"
    return (case.variant, method, place, f"{case.seq_len:,}", gpu, *_train_numbers(one.record))


def _train_numbers(record: Record) -> tuple[str, str, str]:
    """Peak, speed and its spread; a failure in the words of its diagnosis."""
    if record.status == "failed":
        return (_failure(record), "-", "-")
    summary = summarize(record)
    train = summary.train if summary else None
    if train is None or train.peak is None:
        return ("-", "-", "-")
    spread = train.step_time_s.coefficient_of_variation if train.tokens_per_s else None
    return (_gib(train.peak.peak_bytes), _number(train.tokens_per_s, ",.0f"), _number(spread, ".1%"))


# ---------------------------------------------------------------- serving


def _serving(case: object) -> ServeCase | None:
    return case.serve if isinstance(case, ChainCase) else case if isinstance(case, ServeCase) else None


def _serve_order(one: Measured) -> tuple[object, ...]:
    case = _serving(one.record.case)
    assert case is not None
    return (_variant(case.variant), case.adapter, case.tensor_parallel, one.gpu, case.input_len, case.concurrency)


def _serve_cells(one: Measured) -> tuple[str, ...]:
    case = _serving(one.record.case)
    assert case is not None
    load = (f"{case.concurrency}", f"{case.input_len:,} / {case.output_len:,}")
    adapter = case.adapter.split("/")[-1]
    gpu = one.gpu if case.tensor_parallel == 1 else f"{case.tensor_parallel} x {one.gpu}"
    return (case.variant, adapter, gpu, *load, *_serve_numbers(one.record))


def _serve_numbers(record: Record) -> tuple[str, ...]:
    """TTFT and TPOT at the median in ms, tokens/s, the server's KV cache in tokens, seconds until ready."""
    if record.status == "failed":
        return (_failure(record), "-", "-", "-", "-")
    summary = summarize(record)
    serve = summary.serve if summary else None
    if serve is None or serve.load is None:
        return ("-",) * 5
    load = serve.load
    return (
        _number(load.ttft.p50_s, ",.0f", 1000),
        _number(load.tpot.p50_s, ".1f", 1000),
        _number(load.output_tokens_per_s, ",.0f"),
        _number(serve.kv_cache_tokens, ",.0f"),
        _number(serve.ready_s, ",.0f"),
    )


# ---------------------------------------------------------------- probes


def _probe_order(one: Measured) -> tuple[object, ...]:
    case = one.record.case
    assert isinstance(case, ProbeCase)
    return (one.gpu, case.devices, not case.p2p, case.debug)


def _probe_cells(one: Measured) -> tuple[str, ...]:
    case = one.record.case
    assert isinstance(case, ProbeCase)
    place = (f"{case.devices} x {one.gpu}", "on" if case.p2p else "off")
    if one.record.status == "failed":
        return (*place, _failure(one.record), "-", "-")
    summary = summarize(one.record)
    probe = summary.probe if summary else None
    if probe is None:
        return (*place, "-", "-", "-")
    size = _number(probe.bus_size_bytes, ",.0f", 1 / 1024**2)
    return (*place, _number(probe.bus_bytes_per_s, ".1f", 1e-9), size, _number(probe.latency_s, ".0f", 1e6))


TABLES = (
    Table(
        "Training",
        ("variant", "method", "devices", "seq_len:", "GPU", "peak allocated GiB:", "tokens/s:", "step-time CV:"),
        lambda record: isinstance(record.case, TrainCase),
        _train_order,
        _train_cells,
    ),
    Table(
        "Serving",
        (
            "variant", "adapter", "GPU", "concurrency:", "tokens in / out:", "TTFT p50 ms:", "TPOT p50 ms:",
            "output tokens/s:", "KV cache tokens:", "ready after s:",
        ),
        lambda record: _serving(record.case) is not None,
        _serve_order,
        _serve_cells,
    ),
    Table(
        "All-reduce between GPUs",
        ("GPUs", "P2P", "bus GB/s:", "at MiB:", "smallest, median µs:"),
        lambda record: isinstance(record.case, ProbeCase),
        _probe_order,
        _probe_cells,
    ),
)  # fmt: skip


def main() -> None:
    """Print the tables, or write them into README.md."""
    new = text(ROOT / "reports")
    if sys.argv[1:] == ["--write"]:
        page = ROOT / "README.md"
        page.write_text(placed(page.read_text(encoding="utf-8"), new), encoding="utf-8")
    else:
        print(new)


if __name__ == "__main__":
    main()
