"""Verbs about runs: plan, run, report, show, cancel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.common import (
    Backend,
    Box,
    Json,
    Matrix,
    Only,
    Runs,
    Site,
    app,
    console,
    placed,
    print_json,
    show_parts,
)

if TYPE_CHECKING:
    from rich.console import Console

    from harness import pipeline, session


@app.command()
def plan(
    matrix: Matrix,
    only: Only = None,
    command: Annotated[
        str | None, typer.Option("--command", help="Print the exact command line of the case of this id (or pattern).")
    ] = None,
    backend: Backend = "local",
    site: Site = None,
    box: Box = "venv",
    as_json: Json = False,
) -> None:
    """Show what a matrix would run, and what it skips and why."""
    from harness import matrix as matrices
    from harness import pipeline, session

    loaded = matrices.load(matrix)
    if site is not None:
        loaded = session.narrowed(loaded, placed(backend, site, Path("runs"))[0])
    if command is not None:
        commands = pipeline.commands(loaded, command, box)
        if as_json:
            print_json(commands)
        else:
            print("\n\n".join(f"# {item['case']}\n{item['shell']}" for item in commands))
    elif as_json:
        print(loaded.model_dump_json(indent=1))
    else:
        from harness.report import terminal

        show_parts(*terminal.plan(loaded, only))


@app.command()
def run(
    matrix: Matrix,
    runs: Runs = Path("runs"),
    backend: Backend = "local",
    site: Site = None,
    box: Box = "venv",
    only: Only = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Measure failed cases again.")] = False,
    keep_artifacts: Annotated[
        bool, typer.Option("--keep-artifacts", help="Keep checkpoints, adapters and merged models.")
    ] = False,
    have: Annotated[
        list[Path] | None,
        typer.Option("--have", help="Keep what runs at or below this folder have found in such an environment."),
    ] = None,
    host_memory: Annotated[
        float | None,
        typer.Option(
            "--host-memory", min=0.01, help="End a job that needs more GiB of the host's memory (box docker)."
        ),
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option("--scratch", help="Local disk for `checkpoints: local`; default: where temporary files go."),
    ] = None,
    share_process: Annotated[
        bool,
        typer.Option("--share-process", help="Measure like training cases in one process: sooner, with fewer numbers."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured, and stop.")] = False,
    as_json: Json = False,
) -> int:
    """Measure a matrix; on an existing run directory, go on where it stopped."""
    from harness import pipeline, session

    backend, runs = placed(backend, site, runs)
    options = session.Options(
        runs, backend, box, only, retry_failed, keep_artifacts, tuple(have or ()), host_memory, scratch, share_process
    )
    if dry_run:
        return _dry_run(matrix, options, as_json)
    if as_json:
        result = pipeline.run(matrix, options)
        print_json(_result_json(result))
    else:
        result = _run_live(matrix, options)
    return 1 if result.failed else 0


def _dry_run(matrix: Path, options: session.Options, as_json: bool) -> int:
    from harness import pipeline, schema

    loaded, cases = pipeline.pending(matrix, options)
    ids = [schema.case_id(case) for case in cases]
    if as_json:
        print_json({"run": str(options.runs / loaded.name), "would_measure": ids, "skips": len(loaded.skips)})
    else:
        print("\n".join(ids))
        print(f"{len(ids)} of {len(loaded.cases)} cases to measure, {len(loaded.skips)} skips", file=sys.stderr)
    return 0


def _result_json(result: pipeline.Result) -> dict[str, Any]:
    return {
        "run": str(result.run.folder),
        "report": str(result.page),
        "kept": len(result.kept),
        "added": sum(record.parent is not None for record in result.records),
        "cases": [
            {
                "id": record.case_id,
                "status": record.status,
                "kept": record.case_id in result.kept,
                "parent": record.parent,
                "rung": record.rung.name if record.rung else None,
                "record": str(result.run.record_path(record.case_id)),
            }
            for record in result.records
        ],
    }


def _run_live(matrix: Path, options: session.Options) -> pipeline.Result:
    from rich.live import Live

    from harness import pipeline
    from harness.report import terminal

    out = console()
    if not out.is_terminal:
        result = pipeline.run(matrix, options, _line_by_line(out))
    else:
        with Live(console=out, refresh_per_second=4, transient=True) as live:
            result = pipeline.run(matrix, options, lambda progress: live.update(terminal.progress(progress)))
    show_parts(*result.notes, terminal.run_table(result.records, result.kept))
    out.print(f"{'report' if result.page.suffix == '.html' else 'next'}: {result.page}", soft_wrap=True)
    return result


def _line_by_line(out: Console) -> Any:
    """A watcher for logs: one line for each case that ends."""
    from harness.report import terminal

    seen: set[str] = set()
    told: set[str] = set()

    def watch(progress: pipeline.Progress) -> None:
        if progress.kept != told:
            told.update(progress.kept)
            out.print(f"{len(told)} of {progress.total} kept: their records stand", soft_wrap=True)
        for record in progress.records:
            if record.case_id not in seen | progress.kept:
                out.print(terminal.line(record, len(progress.records), progress.total), soft_wrap=True)
            seen.add(record.case_id)

    return watch


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="One run directory, or two to put side by side.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the page.")] = None,
    as_json: Json = False,
) -> None:
    """Make the HTML report of a run, or compare two runs (HTML and CSV)."""
    from harness import results, store

    pages = results.make_report([store.Run.existing(path) for path in runs], out)
    print_json({"files": [str(page) for page in pages]}) if as_json else print("\n".join(map(str, pages)))


@app.command()
def show(
    target: Annotated[str, typer.Argument(help="A run directory, a case's folder or record, or a case id.")],
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Show a run or one case in the terminal."""
    from harness import results
    from harness.report import terminal

    found = results.find(target, runs)
    if as_json:
        print_json([record.model_dump(mode="json") for record in found.records])
    elif found.case is not None:
        show_parts(terminal.case(found.case, found.folder, found.beside))
    else:
        show_parts(terminal.run_table(found.records))


@app.command()
def cancel(run: Annotated[Path, typer.Argument(help="A run directory.")], as_json: Json = False) -> None:
    """End a run and everything it started; finished cases are kept."""
    from harness import pipeline, store

    lines = pipeline.cancel(store.Run.existing(run))
    print_json({"lines": lines}) if as_json else print("\n".join(lines))
