"""The README's table of what was measured, made from the records under reports/.

usage: .venv/bin/python tools/results_table.py [--write]   print the table, or put it into README.md
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from harness import catalog
from harness.schema import Record, TrainCase
from harness.store import Run
from harness.summary import Summary, summarize

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: made by tools/results_table.py -->", "<!-- end of results -->"
GIB = 1024**3


def rows(folder: Path) -> list[str]:
    """A line of the table for each training record of a real variant under `folder`, in reading order."""
    found = []
    for run in sorted(path.parent for path in folder.glob("*/run.json")):
        training = [record for record in Run(run).records() if _belongs(record)]
        found += [_row(record, Run(run).record_path(record.case_id)) for record in sorted(training, key=_order)]
    return found


def _belongs(record: Record) -> bool:
    case = record.case
    return isinstance(case, TrainCase) and case.device == "cuda" and record.status != "skipped"


def _order(record: Record) -> tuple[object, ...]:
    case = record.case
    assert isinstance(case, TrainCase)
    variant = list(catalog.variants()).index(case.variant)
    cap = case.memory_cap_gib or math.inf
    return (variant, case.method, case.strategy, case.devices, cap, case.seq_len, case.repeat)


def _row(record: Record, path: Path) -> str:
    case, where = record.case, record.provenance
    assert isinstance(case, TrainCase)
    assert where is not None
    place = "one" if case.strategy == "none" else f"{case.strategy} x {case.devices}"
    gpu = where.gpus[0].name.removeprefix("NVIDIA ") if where.gpus else "?"
    cap = f"{gpu} as {case.memory_cap_gib:g} GiB" if case.memory_cap_gib else gpu
    link = os.path.relpath(path, ROOT)
    cells = (case.variant, case.method, place, f"{case.seq_len:,}", cap, *_numbers(record, summarize(record)))
    return "| " + " | ".join(cells) + f" | [record]({link}) |"


def _numbers(record: Record, summary: Summary | None) -> tuple[str, str, str]:
    """Peak, speed and its spread; a failure in the words of its diagnosis."""
    if record.status == "failed":
        diagnosis = record.last.diagnosis if record.last else None
        return (diagnosis.failure_class if diagnosis else "failed", "-", "-")
    train = summary.train if summary else None
    if train is None or train.peak is None or train.peak.peak_bytes is None:
        return ("-", "-", "-")
    speed = f"{train.tokens_per_s:,.0f}" if train.tokens_per_s else "-"
    variation = train.step_time_s.coefficient_of_variation
    spread = f"{variation:.1%}" if train.tokens_per_s and variation is not None else "-"
    return (f"{train.peak.peak_bytes / GIB:.1f}", speed, spread)


def table(lines: Iterable[str]) -> str:
    """The table as it stands in README.md, its marks included."""
    head = "| variant | method | devices | seq_len | GPU | peak allocated GiB | tokens/s | step-time CV | |"
    rule = "|---|---|---|---:|---|---:|---:|---:|---|"
    return "\n".join([BEGIN, head, rule, *lines, END])


def placed(readme: str, new: str) -> str:
    """`readme` with the table between the marks replaced."""
    before, rest = readme.split(BEGIN, 1)
    return before + new + rest.split(END, 1)[1]


def main() -> None:
    """Print the table, or write it into README.md."""
    new = table(rows(ROOT / "reports"))
    if sys.argv[1:] == ["--write"]:
        page = ROOT / "README.md"
        page.write_text(placed(page.read_text(encoding="utf-8"), new), encoding="utf-8")
    else:
        print(new)


if __name__ == "__main__":
    main()
