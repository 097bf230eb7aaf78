"""The README's tables of what was measured, made from the records under reports/.

usage: .venv/bin/python tools/results_table.py [--write]   print the tables, or put them into README.md
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import catalog
from harness.report.cards import Card, Fit, tells_of_size, what_fits
from harness.report.entry import NOISY
from harness.report.setups import gpu_name, options, place
from harness.report.words import TIMES
from harness.schema import ChainCase, ProbeCase, Record, ServeCase, TrainCase
from harness.store import Run
from harness.summary import Spread, spread, summarize

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: made by tools/results_table.py -->", "<!-- end of results -->"
GIB = 1024**3
Row = tuple[str, ...]
"""What the first cells of a line say; equal ones are one line."""


@dataclass(frozen=True)
class Measured:
    """A record and where it lies."""

    record: Record
    path: Path

    def link(self, text: str) -> str:
        """`text` as a link to the record, relative to the README."""
        return f"[{text}]({os.path.relpath(self.path, ROOT)})"


def measured(folder: Path) -> list[Measured]:
    """The records under `folder` of what ran on a GPU."""
    runs = [Run(path.parent) for path in sorted(folder.glob("*/run.json"))]
    each = [Measured(record, run.record_path(record.case_id)) for run in runs for record in run.records()]
    return [one for one in each if one.record.case.device == "cuda" and one.record.status != "skipped"]


def text(folder: Path) -> str:
    """The tables as they stand in README.md, their marks included."""
    found = measured(folder)
    tables = (training(found), fits(found), serving(found), probes(found))
    return "\n".join([BEGIN, *(line for table in tables for line in table), "", END])


def placed(readme: str, new: str) -> str:
    """`readme` with what is between the marks replaced."""
    before, rest = readme.split(BEGIN, 1)
    return before + new + rest.split(END, 1)[1]


def _table(title: str, about: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A title, a sentence and a Markdown table; a column's trailing colon aligns it right; nothing of no row."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "".join("---:|" if name.endswith(":") else "---|" for name in columns)
    head = "| " + " | ".join(name.rstrip(":") for name in columns) + " |"
    return ["", f"**{title}** {about}".rstrip(), "", head, rule, *lines] if lines else []


def _grouped(
    found: Iterable[Measured], row: Callable[[Measured], Row], column: Callable[[Measured], int]
) -> dict[Row, dict[int, list[Measured]]]:
    """The records by line and column, lines and columns in order."""
    lines: dict[Row, dict[int, list[Measured]]] = {}
    for one in sorted(found, key=lambda one: (_order(one.record), row(one), column(one))):
        lines.setdefault(row(one), {}).setdefault(column(one), []).append(one)
    return lines


def _order(record: Record) -> tuple[object, ...]:
    """Variants as in the catalog, one device before several."""
    case = record.case
    names = list(catalog.variants())
    return (len(names) if isinstance(case, ProbeCase) else names.index(case.variant), case.devices)


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def _failure(record: Record) -> str:
    diagnosis = record.last.diagnosis if record.last else None
    return diagnosis.failure_class if diagnosis else "failed"


def _linked(found: Sequence[Measured], words: str) -> str:
    """Words that link to their record, or that of several, each of which has its link."""
    if len(found) == 1:
        return found[0].link(words)
    return " ".join([words, *(one.link(f"[{number}]") for number, one in enumerate(found, 1))])


# ---------------------------------------------------------------- training


def _training(record: Record) -> TrainCase:
    assert isinstance(record.case, TrainCase)
    return record.case


def _train_row(one: Measured) -> Row:
    case = _training(one.record)
    method = ", ".join(part for part in (case.method, options(case)) if part)
    return (case.variant, method, "1" if case.strategy == "none" else place(case), gpu_name(one.record))


def training(found: Sequence[Measured]) -> list[str]:
    """What trained on whole cards: a line per set-up and GPU, a column per doubling of the length."""
    whole = [one for one in found if isinstance(one.record.case, TrainCase) and not one.record.case.memory_cap_gib]
    lines = _grouped(whole, _train_row, lambda one: _training(one.record).seq_len)
    lengths = sorted({length for cells in lines.values() for length in cells if length.bit_count() == 1})
    odd = any(length not in lengths for cells in lines.values() for length in cells)
    columns = ["variant", "method", "GPUs", "GPU", *(f"{length:,}:" for length in lengths), *["other lengths"] * odd]
    rows = [[*row, *(_cell(_train_numbers, cells.get(length, [])) for length in lengths),
             *[_other_lengths(cells, lengths)] * odd] for row, cells in lines.items()]  # fmt: skip
    about = (f"by tokens per sample: peak allocated GiB on one GPU / tokens/s of all GPUs. ~: the step time's CV is "
             f"{NOISY:.0%} or more. Several records: the largest peak, median and range of the speeds.")  # fmt: skip
    return _table("Training,", about, columns, rows)


def _other_lengths(cells: Mapping[int, Sequence[Measured]], lengths: Sequence[int]) -> str:
    rest = [f"{length:,}: {_cell(_train_numbers, of)}" for length, of in cells.items() if length not in lengths]
    return ", ".join(rest)


def _cell(numbers: Callable[[Sequence[Record]], str], found: Sequence[Measured]) -> str:
    """What `numbers` says of the records that were measured, and how the others failed; each linked."""
    ran = [one for one in found if one.record.status == "measured"]
    failed = [one.link(_failure(one.record)) for one in found if one.record.status == "failed"]
    return " ".join([_linked(ran, numbers([one.record for one in ran])), *failed] if ran else failed)


def _train_numbers(records: Sequence[Record]) -> str:
    """Peak and speed; of several records the largest peak, and median and range of their speeds."""
    halves = [summary.train for record in records if (summary := summarize(record)) and summary.train]
    peaks = [half.peak.peak_bytes or 0 for half in halves if half.peak]
    speeds = spread([half.tokens_per_s for half in halves if half.tokens_per_s is not None])
    noisy = any((half.step_time_s.coefficient_of_variation or 0) >= NOISY for half in halves)
    mark = "~" if noisy else ""
    return f"{_number(max(peaks, default=None), '.1f', 1 / GIB)} / {_range(speeds, ',.0f')}{mark}"


def _range(of: Spread, form: str) -> str:
    if of.n < 2:
        return _number(of.p50, form)
    return f"{_number(of.p50, form)} ({_number(of.min, form)} to {_number(of.max, form)})"


# ---------------------------------------------------------------- what fits


def fits(found: Sequence[Measured]) -> list[str]:
    """A line per set-up that a cap or a want of memory says something of, a column per size of card."""
    trained = sorted((one for one in found if isinstance(one.record.case, TrainCase)),
                     key=lambda one: (_order(one.record), _train_row(one)[:3]))  # fmt: skip
    known = what_fits((one, one.record) for one in trained)
    told = {name: of for name, of in known.items() if tells_of_size(of)}
    cards = sorted({card for of in told.values() for card in of})
    rows = [[name, *(_fit_cell(of.get(card)) for card in cards)] for name, of in told.items()]
    about = ("The longest sample that trained, in tokens; after “not” the shortest above it that ran out of memory. "
             "“as 24 GiB”: the allocator of a larger GPU held to what a card of that size leaves.")  # fmt: skip
    return _table("What fits which card.", about, ["set-up", *map(_card_name, cards)], rows)


def _card_name(card: Card) -> str:
    return f"as {card.name}" if card.capped else card.name


def _fit_cell(fit: Fit[Measured] | None) -> str:
    if fit is None:
        return ""
    parts = (("", fit.fits), ("not ", fit.fails), ("failed: ", fit.otherwise))
    return ", ".join(f"{words}{point[1].link(f'{point[0]:,}')}" for words, point in parts if point)


# ---------------------------------------------------------------- serving


def _serving(case: object) -> ServeCase | None:
    return case.serve if isinstance(case, ChainCase) else case if isinstance(case, ServeCase) else None


def _serve_row(one: Measured) -> Row:
    case = _serving(one.record.case)
    assert case is not None
    served = ", ".join(part for part in (case.adapter.split("/")[-1].replace("none", "base"), options(case)) if part)
    gpus = f"{case.tensor_parallel} {TIMES} {gpu_name(one.record)}"
    return (case.variant, served, gpus, f"{case.input_len:,} / {case.output_len:,}")


def _load(one: Measured) -> int:
    case = _serving(one.record.case)
    return case.concurrency if case else 0


def serving(found: Sequence[Measured]) -> list[str]:
    """A line per server and length of requests, a column per concurrency."""
    lines = _grouped([one for one in found if _serving(one.record.case)], _serve_row, _load)
    loads = sorted({load for cells in lines.values() for load in cells})
    columns = ["variant", "served", "GPUs", "tokens in / out", *(f"{load} at once:" for load in loads),
               "KV cache tokens:", "ready after s:"]  # fmt: skip
    rows = [[*row, *(_cell(_serve_numbers, cells.get(load, [])) for load in loads), *_server_cells(cells)]
            for row, cells in lines.items()]  # fmt: skip
    return _table("Serving,", "by requests at once: median TTFT ms / median TPOT ms / output tokens/s.", columns, rows)


def _serve_numbers(records: Sequence[Record]) -> str:
    """Medians over the records of each record's own medians."""
    halves = [summary.serve for record in records if (summary := summarize(record)) and summary.serve]
    loads = [half.load for half in halves if half.load]
    ttft = spread([load.ttft.p50_s for load in loads if load.ttft.p50_s is not None]).p50
    tpot = spread([load.tpot.p50_s for load in loads if load.tpot.p50_s is not None]).p50
    output = spread([load.output_tokens_per_s for load in loads if load.output_tokens_per_s is not None]).p50
    return f"{_number(ttft, ',.0f', 1000)} / {_number(tpot, '.1f', 1000)} / {_number(output, ',.0f')}"


def _server_cells(cells: Mapping[int, Sequence[Measured]]) -> tuple[str, str]:
    """What the first server of the line said of its cache and its start."""
    for one in (one for of in cells.values() for one in of if one.record.status == "measured"):
        summary = summarize(one.record)
        if summary and summary.serve:
            cache, ready = summary.serve.kv_cache_tokens, summary.serve.ready_s
            return (one.link(_number(cache, ",.0f")), one.link(_number(ready, ",.0f")))
    return ("-", "-")


# ---------------------------------------------------------------- probes


def probes(found: Sequence[Measured]) -> list[str]:
    """A line per probe."""
    mine = sorted((one for one in found if isinstance(one.record.case, ProbeCase)), key=_probe_order)
    columns = ("GPUs", "P2P", "largest bus GB/s:", "smallest all-reduce, median µs:")
    return _table("All-reduce between GPUs", "", columns, map(_probe_cells, mine))


def _probe_order(one: Measured) -> tuple[object, ...]:
    case = one.record.case
    assert isinstance(case, ProbeCase)
    return (gpu_name(one.record), case.devices, not case.p2p, case.debug)


def _probe_cells(one: Measured) -> tuple[str, ...]:
    case = one.record.case
    assert isinstance(case, ProbeCase)
    where = (f"{case.devices} {TIMES} {gpu_name(one.record)}", "on" if case.p2p else "off")
    summary = summarize(one.record)
    probe = summary.probe if summary else None
    if one.record.status == "failed" or probe is None:
        return (*where, one.link(_failure(one.record)), "-")
    bus = f"{_number(probe.bus_bytes_per_s, '.1f', 1e-9)} at {_number(probe.bus_size_bytes, ',.0f', 1 / 1024**2)} MiB"
    return (*where, one.link(bus), one.link(_number(probe.latency_s, ".0f", 1e6)))


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
