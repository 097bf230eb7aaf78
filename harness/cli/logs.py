"""Verbs about what is at hand: doctor, triage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.common import Json, Runs, app, print_json, show_parts


@app.command()
def doctor(
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Say what this machine can do, and what to mend."""
    from harness import boxes
    from harness import doctor as machine
    from harness.report import terminal

    findings = machine.examine(runs, boxes.get("venv").differences)
    if as_json:
        print(findings.model_dump_json(indent=1))
    else:
        show_parts(terminal.findings(findings))
    return 1 if findings.bad else 0


@app.command()
def triage(
    paths: Annotated[list[Path], typer.Argument(help="Log files, folders or archives of them, Flight Recorder dumps.")],
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write one self-contained page to this file.")] = None,
) -> int:
    """Say what failed in any logs, who began it, the lines that show it, and what to change first."""
    from harness import triage as logs
    from harness.report import triage as views

    found = logs.triage(paths)
    if html is not None:
        views.write_page(found, html)
    if as_json:
        print_json(logs.as_json(found))
    else:
        show_parts(*views.terminal(found))
    return 0 if found.failure_class == "no_failure" else 1
