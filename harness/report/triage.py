"""What logs tell, for a terminal of 80 columns and as one HTML page that needs nothing else.

Text of a log enters the terminal only as `Text` and the page only through escaping.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path

import jinja2
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from harness.errors import HarnessError
from harness.report.words import clean, plural
from harness.schema import Culprit, Evidence, LogVerdict, TimelineEvent

ROLE_STYLE = {"initiating": "bold red", "cascade": "yellow", "teardown": "dim", "advice": "dim"}
MAX_TIMELINE_ROWS = 14
QUOTE_CHARS = 320


def terminal(found: LogVerdict) -> list[RenderableType]:
    """The verdict, who, the quoted evidence, the timeline and the next step."""
    parts: list[RenderableType] = [_verdict(found)]
    if found.evidence:
        parts += [Text("\nEvidence", style="bold"), *(_quote(line) for line in found.evidence)]
    if len(found.timeline) > 1:
        parts += [Text("\nTimeline", style="bold"), _timeline(found.timeline)]
    parts += [Text("\nNext", style="bold"), Padding(_next(found), (0, 0, 0, 2))]
    notes = [*found.notes, *_attempts(found)]
    return [*parts, *(Text(f"note: {clean(note)}", style="dim") for note in notes)]


def _verdict(found: LogVerdict) -> RenderableType:
    good = found.failure_class == "no_failure"
    head = Text(found.failure_class, style="bold green" if good else "bold red")
    head.append(f"  ({found.class_status})", style="dim")
    lines: list[RenderableType] = [head, Text(clean(found.summary))]
    if not good:
        lines.append(Text.assemble(("who: ", "dim"), who(found.culprit), (f"  ({found.culprit_status})", "dim")))
        lines.append(Text.assemble(("cause: ", "dim"), found.cause_status))
    return Group(*lines)


def who(culprit: Culprit | None) -> str:
    """The culprit in words; `nobody named` where the evidence names none."""
    if culprit is None:
        return "nobody named by the evidence"
    parts = (
        f"rank {culprit.rank}" if culprit.rank is not None else "",
        f"GPU {clean(culprit.gpu)}" if culprit.gpu else "",
        f"host {clean(culprit.host)}" if culprit.host else "",
    )
    return ", ".join(part for part in parts if part)


def _quote(line: Evidence) -> RenderableType:
    place = Text(f"  {clean(line.file)}:{line.line}", style="cyan")
    place.append(f"  {line.role}", style=ROLE_STYLE[line.role])
    return Group(place, Padding(Text(_short(line.text)), (0, 0, 0, 4)))


def _short(text: str) -> str:
    cleaned = clean(text)
    return cleaned if len(cleaned) <= QUOTE_CHARS else f"{cleaned[:QUOTE_CHARS]} [...]"


def _timeline(events: tuple[TimelineEvent, ...]) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    for width in (14, 8, 10):
        table.add_column(min_width=width, no_wrap=True)
    table.add_column(overflow="ellipsis", no_wrap=True, ratio=1)
    for event in events[:MAX_TIMELINE_ROWS]:
        rank = f"rank {event.rank}" if event.rank is not None else ""
        style = ROLE_STYLE[event.role]
        row = (event.time or "", rank, event.role, f"{event.failure_class}  {clean(event.text)}")
        table.add_row(*(Text(cell, style=style if index == 2 else "") for index, cell in enumerate(row)))
    return Padding(table, (0, 0, 0, 2))


def _next(found: LogVerdict) -> RenderableType:
    step = Text(clean(found.next.step))
    if found.next.rung:
        step.append(f"  [{found.next.rung}]", style="dim")
    details = [f"why: {found.next.why}", f"cost: {found.next.cost}"]
    return Group(step, *(Text(clean(one), style="dim") for one in details if found.failure_class != "no_failure"))


def _attempts(found: LogVerdict) -> list[str]:
    if found.attempts < 2:
        return []
    earlier = f"; before it: {', '.join(found.earlier)}" if found.earlier else ""
    return [f"the last of {plural(found.attempts, 'attempt')} is judged{earlier}"]


def write_page(found: LogVerdict, out: Path) -> None:
    """Write the page; HarnessError where it cannot be written."""
    try:
        out.write_text(page(found), encoding="utf-8", errors="replace")
    except OSError as error:
        raise HarnessError(
            f"{out}: {error.strerror}", "Name a file in a folder that exists and can be written."
        ) from error


def page(found: LogVerdict) -> str:
    """One HTML page without script; a content policy forbids everything but its own style."""
    folder = resources.files("harness.report") / "templates"
    style = (folder / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((folder / "triage.html").read_text(encoding="utf-8"))
    return template.render(
        found=found, style=style, who=who(found.culprit), notes=[*found.notes, *_attempts(found)], clean=clean,
        policy=f"default-src 'none'; style-src 'sha256-{digest}'",
    )  # fmt: skip
