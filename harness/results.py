"""What stands in run directories, found by name and turned into reports. Reads records; measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness import report, store
from harness.errors import HarnessError
from harness.files import write_atomically
from harness.schema import Record


@dataclass(frozen=True)
class Found:
    """What a person named: a run, or one case of it."""

    folder: Path
    """The run directory."""
    records: tuple[Record, ...]
    case: Record | None = None
    beside: tuple[Record, ...] = ()
    """All records of the run that the case belongs to."""


def report_run(directory: store.Run) -> report.ReportRun:
    """A run directory as the value that reports are made from."""
    records = tuple(directory.records())
    info = directory.info() if (directory.folder / "run.json").is_file() else None
    if not records:
        raise HarnessError(f"{directory.folder}: no records yet", "`harness run MATRIX` makes them")
    return report.ReportRun(
        name=info.name if info else directory.folder.name,
        created=info.created_at if info else min(record.finished_at for record in records),
        records=records,
        source=str(directory.folder),
    )


def render(directory: store.Run) -> Path:
    """Make the report of a run directory from its records; returns the page."""
    page = directory.folder / "index.html"
    report.render([report_run(directory)], page)
    return page


def make_report(directories: Sequence[store.Run], out: Path | None) -> list[Path]:
    """The page of one run, or the page and the CSV that put two side by side; returns the files written."""
    if len(directories) > 2:
        raise HarnessError("a report takes one run, or two to compare", "name one or two run directories")
    runs = _told_apart([report_run(directory) for directory in directories])
    page = out or _default_page(directories)
    page.parent.mkdir(parents=True, exist_ok=True)
    report.render(runs, page)
    if len(runs) == 1:
        return [page]
    table = page.with_suffix(".csv")
    write_atomically(table, report.comparison_csv(runs[0], runs[1]))
    return [page, table]


def _told_apart(runs: list[report.ReportRun]) -> list[report.ReportRun]:
    """Runs of one name, such as those of two nights, called by the end of their paths that tells them apart."""
    paths = [Path(run.source).resolve().parts for run in runs]
    if len({run.name for run in runs}) == len(runs) or len(set(paths)) < len(runs):
        return runs
    depth = next(n for n in range(1, max(map(len, paths)) + 1) if len({path[-n:] for path in paths}) == len(runs))
    return [replace(run, name="/".join(path[-depth:])) for run, path in zip(runs, paths, strict=True)]


def _default_page(directories: Sequence[store.Run]) -> Path:
    if len(directories) == 1:
        return directories[0].folder / "index.html"
    first, second = (directory.folder.resolve().name for directory in directories)
    return directories[1].folder / (f"{first}-vs-{second}.html" if first != second else "comparison.html")


def find(target: str, runs: Path) -> Found:
    """The run or case that `target` names: a run directory, a case's folder or record, a run's name or a case id."""
    path = Path(target)
    for candidate in (path, runs / target):
        if (candidate / "run.json").is_file() or (candidate / "cases").is_dir():
            return Found(candidate, tuple(store.Run(candidate).records()))
    record = path if path.name == "record.json" else path / "record.json"
    if record.is_file():
        return _found(store.Run(record.resolve().parents[2]), record.resolve().parent.name)
    return _by_case_id(target, runs)


def _by_case_id(case_id: str, runs: Path) -> Found:
    matches = sorted(runs.glob(f"*/cases/{store.glob_escape(case_id)}*/record.json"))
    exact = [path for path in matches if path.parent.name == case_id]
    chosen = exact or matches
    if len(chosen) == 1:
        return _found(store.Run(chosen[0].parents[2]), chosen[0].parent.name)
    if not chosen:
        raise HarnessError(
            f"nothing named {target_text(case_id)} here or under {runs}", "`harness show RUN` lists a run's cases"
        )
    names = ", ".join(str(path.parent) for path in chosen[:6])
    raise HarnessError(f"{target_text(case_id)} names {len(chosen)} cases: {names}", "give the folder of one of them")


def target_text(text: str) -> str:
    """What a person typed, quoted and short enough for a message."""
    return repr(text if len(text) <= 120 else text[:117] + "...")


def _found(run: store.Run, case_id: str) -> Found:
    record = run.record(case_id)
    assert record is not None
    return Found(run.folder, (record,), record, tuple(run.records()))
