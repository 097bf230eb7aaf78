"""What a record's detail is made of: facts, tables, texts and figures, whoever renders them."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.report.drawing import Figure
from harness.report.words import MISSING, Cell, one_line

MAX_ROWS = 64
"""Rows of one table in a detail; what is left out is counted."""
Link = Callable[[str], str]
"""From a path relative to the run directory to an address, `""` where none is to be made."""


@dataclass(frozen=True)
class Section:
    """One part of a record's detail: facts, a table, a text or a figure."""

    title: str
    facts: tuple[tuple[str, Cell], ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[Cell, ...], ...] = ()
    text: str = ""
    figure: Figure | None = None
    note: str = ""
    open: bool = False
    """Shown at once, not on a click."""
    from_end: bool = False
    """A text whose end is read first."""


def no_link(path: str) -> str:
    """Where there is nothing to link to."""
    return ""


def word(value: object, why: str = "") -> Cell:
    """Text of a record as one clean cell."""
    return Cell(one_line(str(value)), why)


def words(name: str) -> str:
    """A name of ours or of a payload's, as words."""
    return one_line(name, 60).replace("_", " ")


def table_section(title: str, head: tuple[str, ...], rows: Sequence[tuple[Cell, ...]], **more: Any) -> Section | None:
    """A table, none of no row; what is left out is counted."""
    if not rows:
        return None
    left_out = f"{len(rows) - MAX_ROWS} further rows are in the record." if len(rows) > MAX_ROWS else ""
    return Section(title, head=head, rows=tuple(rows[:MAX_ROWS]), note=left_out, **more)


def facts_section(title: str, facts: Iterable[tuple[str, Cell]], **more: Any) -> Section | None:
    """A list of facts, none of no fact."""
    found = tuple(facts)
    return Section(title, facts=found[: 4 * MAX_ROWS], **more) if found else None


def when(seconds: float) -> str:
    """Unix seconds as UTC, to the second."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def plain_json(value: Any) -> str:
    """A JSON value as a person reads it: `mamba 49,152, mlp 24,576`."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain_json(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(plain_json(item) for item in value)
    return str(value)


def as_json(section: Section) -> dict[str, Any]:
    """A section for the page: only what it has, cells as short lists."""
    found: dict[str, Any] = {"t": section.title}
    if section.facts:
        found["f"] = [[name, *_short(cell)] for name, cell in section.facts]
    if section.rows:
        found["h"], found["r"] = section.head, [[_short(cell) for cell in row] for row in section.rows]
    rest = {"x": section.text, "p": section.figure, "n": section.note, "o": section.open,
            "e": section.from_end}  # fmt: skip
    return found | {key: value for key, value in rest.items() if value}


def _short(cell: Cell) -> list[str]:
    return [cell.text, cell.why, cell.href] if cell.href else [cell.text, cell.why] if cell.why else [cell.text]
