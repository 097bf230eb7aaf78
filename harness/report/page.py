"""Runs -> one HTML file that needs nothing else: plotly.js inlined once, a strict content policy, everything escaped.

The page holds its tables and details as JSON, which its own script turns into text nodes; nothing of a record is ever
read as HTML. A detail is parsed, and a figure drawn, only when somebody opens it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from plotly.offline import get_plotlyjs

from harness.report import compare, figures, headline, parts, sections
from harness.report.drawing import Drawn
from harness.report.entry import Entry, ReportRun, counts, entries, full_label, number_label, verdict
from harness.report.ladders import changed
from harness.report.tables import KINDS, columns_of
from harness.report.words import TIMES, Cell, missing, one_line, plural
from harness.schema import Record

DETAILS_LIMIT_BYTES = 48_000_000
"""All details of one page together; divided by their number, within the two limits below, it bounds each of them."""
DETAIL_MOST_BYTES = 96_000
DETAIL_LEAST_BYTES = 6_000
MAX_SKIP_EXAMPLES = 8
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False)


def render(runs: Sequence[ReportRun], out: Path) -> None:
    """Write the page of one run, or of several with each later one compared to the first; OSError where it cannot."""
    text = html_of(runs, out.parent)
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with open(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        Path(name).chmod(0o644)
        os.replace(name, out)
    finally:
        Path(name).unlink(missing_ok=True)


def html_of(runs: Sequence[ReportRun], folder: Path) -> str:
    """The page's text, for a file that will stand in `folder`."""
    found = [entries(run.name, run.records, name_run=len(runs) > 1) for run in runs]
    everything = [entry for of_run in found for entry in of_run]
    compared = [
        compare.compare(found[0], other, (runs[0].name, run.name))
        for run, other in zip(runs[1:], found[1:], strict=True)
    ]
    script, style, plotly = _asset("report.js"), _asset("report.css"), get_plotlyjs()
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=" vs ".join(one_line(run.name, 80) for run in runs),
            runs=[headline.run_facts(run) for run in runs],
            counts=[(one_line(run.name, 80), counts(run.records)) for run in runs],
            answers=headline.answers(everything) if len(runs) == 1 else headline.changes(compared),
            failures=headline.failures(everything, compared),
            differences=headline.differences(runs) if len(runs) > 1 else [],
            searches=headline.searches(everything),
            cards=headline.cards(everything),
            skips=_skips(everything),
            environments=headline.environments(runs),
            environment_head=sections.ENVIRONMENT_HEAD,
            numbers=_number_kinds(everything),
            data=compact(_data(found, compared)),
            figures=[(title, compact(drawn.figure), drawn.note) for title, drawn in _figures(everything)],
            details=_details(runs, found, folder),
            csp=content_policy(script, style, plotly),
            script=script,
            style=style,
            plotly=plotly,
        )
    )


def content_policy(script: str, style: str, plotly: str) -> str:
    """Nothing may be fetched, and only these three texts may run or style the page.

    The hash of the empty text is for the style element that plotly.js makes and fills by rule; the map styles that it
    also carries stay refused.
    """
    scripts = " ".join(_hash(text) for text in (script, plotly))
    return (f"default-src 'none'; script-src {scripts}; style-src {_hash(style)} {_hash('')}; img-src data: blob:; "
            "base-uri 'none'; form-action 'none'")  # fmt: skip


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _environment() -> jinja2.Environment:
    templates = resources.files("harness.report") / "templates"
    loader = jinja2.FunctionLoader(lambda name: (templates / name).read_text(encoding="utf-8"))
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip


def _asset(name: str) -> str:
    return (resources.files("harness.report") / "templates" / name).read_text(encoding="utf-8")


def compact(value: Any) -> str:
    """JSON for a `<script type="application/json">`: nothing in it can end the element or begin a comment."""
    text = _ENCODER.encode(value)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


# ---------------------------------------------------------------- links


def linker(run: ReportRun, folder: Path) -> parts.Link:
    """Addresses of files of a run, relative to the page in `folder`.

    None for a path that leaves the run directory, nor for logs where records were kept without the jobs' folders.
    """
    base = os.path.relpath(Path(run.source).resolve(), folder.resolve())
    has_logs = (Path(run.source) / "jobs").is_dir()

    def link(path: str) -> str:
        clean = os.path.normpath(path)
        top = clean.split(os.sep)[0]
        if os.path.isabs(clean) or top == ".." or (top == "jobs" and not has_logs):
            return ""
        return quote(os.path.normpath(os.path.join(base, clean)), errors="replace")

    return link


def _links(entry: Entry, link: parts.Link) -> list[list[str]]:
    """The record, and the folder and logs of the attempt that decided it."""
    found = [["record", link(f"cases/{entry.record.case_id}/record.json")]]
    for job in entry.record.last.jobs if entry.record.last else ():
        half = f"{job.environment} " if len(entry.record.last.jobs if entry.record.last else ()) > 1 else ""
        found += [[f"{half}stdout", link(f"{job.dir}/stdout.log")], [f"{half}stderr", link(f"{job.dir}/stderr.log")],
                  [f"{half}folder", link(job.dir)]]  # fmt: skip
    return [pair for pair in found if pair[1]]


# ---------------------------------------------------------------- what the page's script reads


def _data(found: Sequence[Sequence[Entry]], compared: Sequence[compare.Compared]) -> dict[str, Any]:
    indexed = list(enumerate(entry for of_run in found for entry in of_run))
    tables = [_table(kind, [(i, e) for i, e in indexed if e.case.kind == kind]) for kind in KINDS]
    usual = _usual_number([entry for _, entry in indexed])
    for row in (row for table in tables for row in table["rows"]):
        row["n"] = "" if row["n"] == usual else row["n"]
    return {"tables": [table for table in tables if table["rows"]], "compared": [_compared(one) for one in compared]}


def _table(kind: str, rows: Sequence[tuple[int, Entry]]) -> dict[str, Any]:
    columns = columns_of(kind, [entry for _, entry in rows])
    head: list[list[Any]] = [
        ["Case", "Variant, and in which fields it is not like most of its run", 0],
        ["Status", "How it ended, and what a person should know of it", 0],
    ]
    head += [[column.title, column.hint, int(column.numeric)] for column in columns]
    shown = [_row(i, entry, [column.of(entry) for column in columns]) for i, entry in rows]
    return {"kind": kind, "title": KINDS[kind], "head": head, "rows": shown}


def _row(index: int, entry: Entry, cells: Sequence[Cell]) -> dict[str, Any]:
    record, (tone, sentence) = entry.record, verdict(entry)
    name = Cell(one_line(entry.subject, 80), record.case_id, one_line(entry.subject, 80))
    apart = [one_line(text, 160) for text in (entry.beside, entry.differs, _added(record)) if text]
    words = (record.case_id, full_label(entry), number_label(entry), sentence, record.skip_rule or "")
    return {
        "i": index,
        "s": record.status,
        "tone": tone,
        "v": sentence,
        "n": number_label(entry) if record.status == "measured" else "",
        "apart": ", ".join(apart),
        "q": " ".join(words).lower(),
        "c": [_values(cell) for cell in (name, Cell(record.status, "", record.status), *cells)],
    }


def _added(record: Record) -> str:
    return f"added by a ladder: {changed(record.rung)}" if record.rung else "added by a ladder" if record.parent else ""


def _number_kinds(everything: Sequence[Entry]) -> str:
    """What kinds of numbers the page holds, and how many cases of each; the most frequent stands in no row."""
    kinds = _kinds(everything).most_common(6)
    named = [f"{name} ({plural(amount, 'case')})" for name, amount in kinds]
    others = f"; as their rows say, {'; '.join(named[1:])}" if named[1:] else ""
    return named[0] + others if named else ""


def _kinds(everything: Sequence[Entry]) -> Counter[str]:
    return Counter(number_label(entry) for entry in everything if entry.record.status == "measured")


def _usual_number(everything: Sequence[Entry]) -> str:
    """The kind of most numbers: said once above the table, and in the rows that are of another."""
    return next(iter(name for name, _ in _kinds(everything).most_common(1)), "")


def _values(cell: Cell) -> list[Any]:
    """Text, what orders the column, and the hover text where there is one."""
    return [cell.text, cell.sort, cell.why] if cell.why else [cell.text, cell.sort]


def _compared(found: compare.Compared) -> dict[str, Any]:
    base, other = one_line(found.base, 60), one_line(found.other, 60)
    head = [["Case", "", 0], ["Measure", "", 0], [base, "median (smallest to largest), n repeats", 1],
            [other, "median (smallest to largest), n repeats", 1], ["Ratio", f"{other} over {base}", 1],
            ["Reading", "By the spread of the repeats; single values have none", 0]]  # fmt: skip
    first = {compare.NEWLY_FAILED: 0, "worse": 1, "better": 2, "no longer fails": 3}
    ordered = sorted(found.rows, key=lambda row: first.get(row.judgement, 4))
    rows = [_compared_row(index, row) for index, row in enumerate(ordered)]
    only = [[base, [one_line(name, 160) for name in found.only_base]],
            [other, [one_line(name, 160) for name in found.only_other]]]  # fmt: skip
    return {"kind": "compare", "title": f"{other} against {base}", "head": head, "rows": rows, "only": only}


def _compared_row(index: int, row: compare.Comparison) -> dict[str, Any]:
    tone = {"better": "good", "no longer fails": "good", "worse": "bad", compare.NEWLY_FAILED: "bad"}.get(
        row.judgement, "none"
    )
    unit = f", {row.measure.unit}" if row.measure.unit else ""
    ratio = missing("not measured in both") if row.ratio is None else Cell(f"{TIMES} {row.ratio:.3f}", "", row.ratio)
    cells = (Cell(row.label, row.case_id, row.label), Cell(row.measure.name + unit, "", row.measure.name),
             compare.side(row.base, row.base_status), compare.side(row.other, row.other_status), ratio,
             Cell(row.judgement, "", row.judgement))  # fmt: skip
    return {"i": index, "tone": tone, "q": f"{row.case_id} {row.label} {row.measure.name} {row.judgement}".lower(),
            "c": [_values(cell) for cell in cells]}  # fmt: skip


def _figures(everything: Sequence[Entry]) -> list[tuple[str, Drawn]]:
    drawn = [(title, make(everything)) for title, make in figures.FIGURES]
    return [(title, one) for title, one in drawn if one is not None]


def _details(runs: Sequence[ReportRun], found: Sequence[Sequence[Entry]], folder: Path) -> list[str]:
    """Each record's detail as JSON text, in the order of the rows' indices."""
    amount = sum(len(of_run) for of_run in found)
    limit = max(DETAIL_LEAST_BYTES, min(DETAIL_MOST_BYTES, DETAILS_LIMIT_BYTES // max(1, amount)))
    details = []
    for run, of_run in zip(runs, found, strict=True):
        link = linker(run, folder)
        details += [detail(entry, link, limit) for entry in of_run]
    return details


def detail(entry: Entry, link: parts.Link, limit_bytes: int) -> str:
    """A record's detail as JSON of at most about `limit_bytes`; parts that do not fit are left out and named.

    The largest go first, and of those only such as a reader would have to open: a diagnosis outlives a table of ranks.
    """
    found = [(part.open, part.title, compact(parts.as_json(part))) for part in sections.sections(entry, link)]
    sizes = {title: len(text.encode()) for _, title, text in found}
    left_out: list[str] = []
    while sum(sizes.values()) > limit_bytes:
        dropped = max((part for part in found if part[1] in sizes), key=lambda part: (not part[0], sizes[part[1]]))[1]
        left_out.append(dropped)
        del sizes[dropped]
    head = {"id": one_line(entry.record.case_id, 160), "label": full_label(entry), "links": _links(entry, link),
            "num": number_label(entry), "left_out": left_out}  # fmt: skip
    texts = ",".join(text for _, title, text in found if title in sizes)
    return f'{{"head":{compact(head)},"sections":[{texts}]}}'


def _skips(everything: Sequence[Entry]) -> list[dict[str, Any]]:
    """Skips grouped by their reason, most frequent first."""
    skipped = [entry for entry in everything if entry.record.status == "skipped"]
    keys = Counter((entry.record.skip_rule or "", one_line(entry.record.skip_reason or "")) for entry in skipped)
    groups = []
    for (rule, reason), amount in keys.most_common():
        names = [full_label(entry) for entry in skipped if (entry.record.skip_rule or "", one_line(
            entry.record.skip_reason or "")) == (rule, reason)]  # fmt: skip
        more = f"and {plural(len(names) - MAX_SKIP_EXAMPLES, 'more')}" if len(names) > MAX_SKIP_EXAMPLES else ""
        groups.append({"rule": one_line(rule, 80), "reason": reason, "n": f"{amount:,}", "more": more.rstrip("s"),
                       "cases": names[:MAX_SKIP_EXAMPLES]})  # fmt: skip
    return groups
