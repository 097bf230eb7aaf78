"""The verb that tests triage on this machine: drill."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from harness.cli.common import Box, Json, app, console, print_json, show_parts

DEBUG = (
    "Without (off) and with (on) NCCL_DEBUG, TORCH_DISTRIBUTED_DEBUG, Flight Recorder and error files: on, off or both."
)


@app.command()
def drill(
    listed: Annotated[bool, typer.Option("--list", help="List the faults, and inject none.")] = False,
    only: Annotated[str | None, typer.Option("--only", help="Only faults that match these patterns: A,B*.")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="Where to inject: cpu or cuda.")] = "cpu",
    gpus: Annotated[int | None, typer.Option("--gpus", help="GPUs to use at most; default: those there are.")] = None,
    debug: Annotated[Literal["on", "off", "both"], typer.Option("--debug", help=DEBUG)] = "both",
    out: Annotated[Path | None, typer.Option("--out", help="A new folder for logs, truth and scorecard.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="How many to run at a time.")] = 1,
    box: Box = "venv",
    as_json: Json = False,
) -> int:
    """Inject faults on this machine, and check that triage names them."""
    from harness import drill as drills

    if listed:
        faults = drills.chosen(only, device)
        if as_json:
            print_json([one.model_dump(mode="json") for one in faults])
        else:
            show_parts(drills.listing(faults))
        return 0
    folder = out or Path("drills") / time.strftime("%Y-%m-%d-%H%M%S")
    options = drills.Options(folder, only, device, gpus, debug, box, jobs)
    to = console(stderr=as_json)
    results = drills.run(options, lambda *ended: to.print(drills.line(*ended)))
    if as_json:
        listing = [one.model_dump(mode="json") for one in results]
        print_json({"out": str(folder), "summary": drills.summary(results), "drills": listing})
    else:
        show_parts("", drills.table(results, folder))
        to.print(f"logs and truth: {folder}", soft_wrap=True)
    return drills.exit_code(results)
