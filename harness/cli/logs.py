"""Verbs about what is at hand: doctor, triage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.common import Json, Runs, app, print_json, show_parts

if TYPE_CHECKING:
    from harness.backends.slurm.check import Said
    from harness.doctor import Findings


@app.command()
def doctor(
    runs: Runs = Path("runs"),
    site: Annotated[
        str | None, typer.Option("--site", help="Check this Slurm site instead, and run a probe of a minute on it.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Say what this machine can do, and what to mend."""
    from harness import boxes
    from harness import doctor as machine
    from harness.report import terminal

    findings = _site_findings(site) if site else machine.examine(runs, boxes.get("venv").differences)
    if as_json:
        print(findings.model_dump_json(indent=1))
    else:
        show_parts(terminal.findings(findings))
    return 1 if findings.bad else 0


def _site_findings(site: str) -> Findings:
    """What Slurm says of a site file, and what came of a probe on its nodes."""
    from harness.backends.slurm import check
    from harness.doctor import Finding, Findings

    said = check.check(site)
    if all(item.status != "bad" for item in said):
        said.append(_probe(site))
    found = ({"topic": item.topic, "status": item.status, "text": item.text, "mend": item.mend} for item in said)
    return Findings(findings=tuple(Finding.model_validate(item) for item in found))


def _probe(site: str) -> Said:
    """One short all-reduce on the site's nodes, through everything that a run uses."""
    import time

    from harness import backends, pipeline, session
    from harness.backends.slurm import check

    name, shared = f"doctor-{time.strftime('%Y%m%d-%H%M%S')}", backends.shared_runs(f"slurm:{site}")
    path = shared / f"{name}.yaml"
    path.write_text(check.probe_matrix(site, name), encoding="utf-8")
    try:
        (record,) = pipeline.run(path, session.Options(runs=shared, backend=f"slurm:{site}")).records
    finally:
        path.unlink()
    place, last = shared / name, record.last
    hosts = ", ".join(last.jobs[-1].outcome.hosts) if last else ""
    if record.status == "measured":
        return check.Said("probe", "ok", f"Ranks on {hosts} reduced together; the record is in {place}.")
    why = last.diagnosis.summary if last and last.diagnosis else record.skip_reason or "it was not run"
    return check.Said("probe", "bad", f"The probe on {hosts or 'the site'} failed: {why}", f"harness show {place}")


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
