"""Drills for a terminal of 80 columns: one line as each ends, and the scorecard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from harness.drill.faults import Fault
from harness.drill.score import Drilled, rank_of, summary

STYLE = {"right": "green", "wrong": "bold red", "skipped": "dim", "not injected": "yellow"}
INDENT = (0, 0, 0, 9)
"""Of a reason under its drill."""


def line(one: Drilled, number: int, total: int) -> RenderableType:
    """One drill as it ends; why, under it, where it was not right."""
    begin = Text.assemble(f"{number:>{len(str(total))}}/{total} ", (f"{one.status:6}", STYLE[one.status]))
    said = _said(one.found_class, rank_of(one.found_culprit)) if one.status in ("right", "wrong") else ""
    begin.append(f" {_id(one):28} {said:25} {one.seconds:3.0f} s" if one.seconds else f" {_id(one)}")
    return Group(begin, Padding(Text(one.reason), INDENT)) if one.reason else begin


def table(results: Sequence[Drilled], out: Path) -> RenderableType:
    """A line per fault, with debug variables off and on beside each other, then what was not right and the counts."""
    rows = Table(box=None, padding=(0, 1), pad_edge=False)
    for column in ("fault", "what the log can show", "off", "on"):
        rows.add_column(column, header_style="dim", no_wrap=True)
    for name in dict.fromkeys(one.name for one in results):
        of = {one.debug: one for one in results if one.name == name}
        expected = {_said(one.expected_class, rank_of(one.expected_culprit)): None for one in of.values()}
        rows.add_row(name, "\n".join(expected), *(_status(of.get(debug)) for debug in (False, True)))
    less = [Text(f"note: {_id(one)}: {one.why}", style="dim") for one in results if one.why and one.found_class]
    return Group(rows, *less, *_wrong(results, out), *_not_judged(results), Text(sentence(results), style="bold"))


def _status(one: Drilled | None) -> Text:
    return Text(one.status, style=STYLE[one.status]) if one else Text("")


def _wrong(results: Sequence[Drilled], out: Path) -> list[RenderableType]:
    """What triage got wrong, and where to read it."""
    wrong = [one for one in results if one.status == "wrong"]
    return [Group(Text(f"wrong: {_id(one)}: {one.reason}", style="red"),
                  Padding(Text(f"harness triage {out / one.folder / 'seen'}", no_wrap=True), (0, 0, 0, 2)))
            for one in wrong]  # fmt: skip


def _not_judged(results: Sequence[Drilled]) -> list[RenderableType]:
    """Each reason once, with the faults that it holds for."""
    reasons = Counter((one.status, one.reason) for one in results if one.status in ("skipped", "not injected"))
    named = {key: sorted({one.name for one in results if (one.status, one.reason) == key}) for key in reasons}
    return [Text(f"{status}: {', '.join(named[status, reason])}: {reason}", style=STYLE[status])
            for status, reason in reasons]  # fmt: skip


def listing(faults: Sequence[Fault]) -> RenderableType:
    """What can be injected: name and class, and what is really done."""
    rows = Table(box=None, padding=(0, 1), pad_edge=False)
    for column, wrapped in (("fault", False), ("class", False), ("what is really done", True)):
        rows.add_column(column, header_style="dim", no_wrap=not wrapped)
    for one in faults:
        rows.add_row(one.name, one.failure_class, one.done)
    return Group(rows, Text(f"{len(faults)} faults and healthy runs", style="dim"))


def _id(one: Drilled) -> str:
    return f"{one.name}-{'on' if one.debug else 'off'}"


def _said(failure_class: str, rank: int | None) -> str:
    return failure_class if rank is None else f"{failure_class} rank {rank}"


def sentence(results: Sequence[Drilled]) -> str:
    """The counts in one sentence."""
    counts = summary(results)
    return (
        f"{counts['class_right']} of {counts['faults']} faults named, {counts['culprit_right']} of "
        f"{counts['culprits']} culprits, {counts['culprit_wrong']} wrong ones; {counts['false_alarms']} alarms in "
        f"{counts['healthy']} healthy runs; {counts['skipped']} skipped, {counts['not_injected']} not injected"
    )
