"""What a terminal shows, as rich renderables that the command line prints; readable at 80 columns.

Text of a record only ever enters as `Text`, so that nothing in it is taken for markup, and is cleaned of control codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from harness import frontier
from harness.report.chain import answer, conclusion
from harness.report.entry import Entry, counts, entries, full_label, number_label, verdict
from harness.report.ladders import changed
from harness.report.parts import Section
from harness.report.sections import sections
from harness.report.tables import key_number
from harness.report.words import MISSING, clean, digits, duration, one_line, plural, size
from harness.schema import Plan, Record, asked_for, case_id

if TYPE_CHECKING:
    from collections.abc import Iterable

STATUS_STYLE = {"measured": "green", "failed": "bold red", "skipped": "dim"}
TONE_STYLE = {"good": "dim", "note": "yellow", "bad": "red", "none": "dim"}
FINDING_STYLE = {"ok": "green", "warn": "yellow", "bad": "bold red", "absent": "dim"}
MAX_RUNNING = 8
"""Jobs at work that the live view lists."""
LABEL_WIDTH = 26


class _LiveGpu(Protocol):
    @property
    def memory_used_bytes(self) -> int | None: ...
    @property
    def power_w(self) -> float | None: ...


class _Live(Protocol):
    @property
    def phase(self) -> str | None: ...
    @property
    def step(self) -> int | None: ...
    @property
    def total_steps(self) -> int | None: ...
    @property
    def step_time_s(self) -> float | None: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def tokens_per_s(self) -> float | None: ...
    @property
    def load_points_done(self) -> int: ...
    @property
    def load_points(self) -> int | None: ...
    @property
    def gpus(self) -> Sequence[_LiveGpu]: ...


class _Job(Protocol):
    @property
    def id(self) -> str: ...


class _Running(Protocol):
    @property
    def job(self) -> _Job: ...
    @property
    def live(self) -> _Live: ...


class Progress(Protocol):
    """What the live view needs of a run at work."""

    @property
    def total(self) -> int: ...
    @property
    def added(self) -> int: ...
    @property
    def records(self) -> tuple[Record, ...]: ...
    @property
    def kept(self) -> frozenset[str]: ...
    @property
    def running(self) -> Sequence[_Running]: ...
    @property
    def seconds_left(self) -> float | None: ...


class _Finding(Protocol):
    @property
    def topic(self) -> str: ...
    @property
    def status(self) -> Any: ...
    @property
    def text(self) -> str: ...
    @property
    def mend(self) -> str: ...


class Findings(Protocol):
    """What `doctor` found."""

    @property
    def findings(self) -> Sequence[_Finding]: ...


def _safe(text: str, style: str = "") -> Text:
    return Text(one_line(text), style=style)


def _grid(*widths: int | None) -> Table:
    """A borderless table; a column of width `None` takes what is left."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), expand=True)
    for width in widths:
        table.add_column(width=width, ratio=None if width else 1, overflow="fold")
    return table


# ---------------------------------------------------------------- a run


def run_table(records: Sequence[Record], kept: frozenset[str] = frozenset()) -> RenderableType:
    """A run's cases with status, key number and verdict, and the counts; `kept` are ids not measured by this call."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    table.add_column("status", width=8)
    table.add_column("case", ratio=1, overflow="fold")
    table.add_column("key number", justify="right", width=18)
    found = entries("", records)
    for entry in found:
        if entry.record.skip_rule in frontier.RULES:
            continue  # what a search left out stands in its one line below
        table.add_row(*_run_row(entry, entry.record.case_id in kept))
    return Group(table, Text(), *_searches(found), _counted(records), *_number_kinds(records))


def _run_row(entry: Entry, kept: bool) -> tuple[Text, Text, Text]:
    status, (tone, sentence) = entry.record.status, verdict(entry)
    case = Text(one_line(entry.record.case_id))
    case.append(f"\n{sentence}", style=TONE_STYLE[tone])
    if entry.record.rung:
        case.append(f"\nadded by a ladder: {entry.record.rung.code} {changed(entry.record.rung)}", style="cyan")
    elif entry.chain:
        case.append(f"\n{conclusion(entry.chain)}", style="cyan")
    shown = "kept" if kept and status == "measured" else status
    return Text(shown, style=STATUS_STYLE[status]), case, Text(key_number(entry).text)


def _searches(found: Sequence[Entry]) -> list[Text]:
    """What each search of the run found."""
    searches = list({id(entry.search): entry.search for entry in found if entry.search}.values())
    return [Text(f"search: {answer(search)}", style="cyan") for search in searches]


def _counted(records: Sequence[Record]) -> Text:
    found = counts(records)
    text = Text(f"{plural(found['planned'], 'case')} planned: ")
    for index, status in enumerate(("measured", "failed", "skipped")):
        style = STATUS_STYLE[status] if found[status] else "dim"
        text.append(", " if index else "").append(f"{found[status]} {status}", style=style)
    return text.append(f"; {found['added']} added by a ladder" if found["added"] else "")


def _number_kinds(records: Sequence[Record]) -> list[Text]:
    kinds = {number_label(entry) for entry in entries("", records) if entry.record.status == "measured"}
    return [Text(f"numbers are {'; '.join(sorted(kinds))}", style="dim")] if kinds else []


def line(record: Record, done: int, total: int) -> RenderableType:
    """One line for a case that has ended."""
    entry = entries("", [record])[0]
    text = Text(f"[{done}/{total}] ").append(record.status, style=STATUS_STYLE[record.status])
    text.append(f" {one_line(record.case_id)}: ")
    if record.rung:
        text.append(f"(ladder: {record.rung.name}) ", style="cyan")
    return text.append(key_number(entry).text if record.status == "measured" else verdict(entry)[1])


def progress(now: Progress) -> RenderableType:
    """The live view: cases done, what each running job is at, time left."""
    failed = sum(record.status == "failed" for record in now.records)
    head = Text(f"{len(now.records)} of {plural(now.total, 'case')} done")
    head.append(f" ({now.added} added by ladders)" if now.added else "", style="cyan")
    head.append(f", {failed} failed" if failed else "", style="bold red")
    head.append(f", {len(now.kept)} kept" if now.kept else "", style="dim")
    head.append(f", about {duration(now.seconds_left).text} left" if now.seconds_left is not None else "", style="dim")
    table = _grid(None, 44)
    for running in now.running[:MAX_RUNNING]:
        table.add_row(_safe(running.job.id, "cyan"), Text(_doing(running.live)))
    more = [Text(f"and {len(now.running) - MAX_RUNNING} more")] if len(now.running) > MAX_RUNNING else []
    return Group(head, table, *more)


def _doing(live: _Live) -> str:
    parts = [one_line(live.phase or "starting", 30).replace("_", " ")]
    if live.step is not None:
        parts.append(f"step {live.step}" + (f"/{live.total_steps}" if live.total_steps else ""))
    parts += [f"{duration(live.step_time_s).text}/step"] if live.step_time_s is not None else []
    parts += [f"loss {digits(live.loss)}"] if live.loss is not None else []
    parts += [f"{digits(live.tokens_per_s)} tokens/s"] if live.tokens_per_s else []
    parts += [f"load point {live.load_points_done}/{live.load_points}"] if live.load_points else []
    parts += [_gpu(gpu) for gpu in live.gpus if gpu.memory_used_bytes is not None]
    return ", ".join(parts)


def _gpu(gpu: _LiveGpu) -> str:
    watts = f" {gpu.power_w:.0f} W" if gpu.power_w is not None else ""
    return f"{size(gpu.memory_used_bytes).text}{watts}"


# ---------------------------------------------------------------- a plan


def plan(loaded: Plan, only: str | None = None) -> list[RenderableType]:
    """The cases of a plan and its skips with their reasons; `only` names some by patterns over their ids."""
    cases = [name for name in map(case_id, loaded.cases) if asked_for(name, only)]
    skips = [(case_id(skip.case), skip) for skip in loaded.skips]
    skips = [(name, skip) for name, skip in skips if asked_for(name, only)]
    found: list[RenderableType] = [_safe(name) for name in cases]
    for name, skip in skips:
        found.append(Group(_safe(f"skip {name}", "dim"), _safe(f"     {skip.reason}", "dim")))
    total = f"{one_line(loaded.name)}: {plural(len(cases), 'case')} to measure, {plural(len(skips), 'skip')}"
    return [*found, *_beyond(loaded, set(cases)), Text(total, style="bold")]


def _beyond(loaded: Plan, cases: set[str]) -> list[Text]:
    """What searches leave of the cases, and how many may climb a ladder."""
    sizes = [len(cases & set(search.case_ids)) for search in loaded.frontiers]
    runs = sum(map(frontier.most_runs, sizes))
    lines = []
    if runs:
        lines.append(
            f"searches take at most {plural(runs, 'run')} for {plural(sum(sizes), 'case')}; the rest are skips"
        )
    if climbing := cases & loaded.ladders.keys():
        lines.append(f"{plural(len(climbing), 'case')} may climb a ladder where memory or communication fails")
    return [Text(line, style="cyan") for line in lines]


# ---------------------------------------------------------------- a case


def case(record: Record, folder: Path, beside: Sequence[Record] = ()) -> RenderableType:
    """Everything about one record; `folder` is its run directory, `beside` are that run's records."""
    entry = next(one for one in entries(folder.name, beside or [record]) if one.record.case_id == record.case_id)
    tone, sentence = verdict(entry)
    head = Text(one_line(record.case_id), style="bold")
    second = Text(record.status, style=STATUS_STYLE[record.status])
    second.append(f"  {sentence}", style=TONE_STYLE[tone]).append(f"  ({number_label(entry)})", style="dim")
    files = Text(str(folder / "cases" / record.case_id / "record.json"), style="dim", overflow="fold")
    parts = [part for section in sections(entry) if section.figure is None for part in _section(section)]
    return Group(head, Text(full_label(entry)), second, files, *parts)


def _section(section: Section) -> Iterable[RenderableType]:
    yield Text(f"\n{section.title}", style="bold")
    if section.facts:
        table = _grid(LABEL_WIDTH, None)
        for name, cell in section.facts:
            table.add_row(_safe(name, "dim"), _cell(cell.text, cell.why))
        yield table
    if section.rows:
        yield _rows(section)
    if section.text:
        yield Text(clean(section.text), style="dim", overflow="fold")
    if section.note:
        yield _safe(section.note, "dim")


def _cell(text: str, why: str) -> Text:
    """A value; a missing one says why."""
    return Text(text if text != MISSING or not why else f"{text}  ({why})", style="dim" if text == MISSING else "")


def _rows(section: Section) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in section.head:
        table.add_column(Text(name), overflow="fold")
    for row in section.rows:
        table.add_row(*(Text(cell.text) for cell in row))
    return table


# ---------------------------------------------------------------- doctor


def findings(found: Findings) -> RenderableType:
    """What this machine can do, what is wrong with it, and how to mend that."""
    table = _grid(7, 14, None)
    for finding in found.findings:
        text = _safe(finding.text)
        text.append(f"\n{one_line(finding.mend)}" if finding.mend else "", style="dim")
        table.add_row(Text(finding.status, style=FINDING_STYLE[finding.status]), _safe(finding.topic), text)
    return table
