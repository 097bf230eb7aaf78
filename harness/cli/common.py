"""What the verbs share: the application, common options, and printing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.errors import HarnessError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Bench and diagnose fine-tuning and serving of NVIDIA's Nemotron Nano models.",
)

Matrix = Annotated[Path, typer.Argument(help="A matrix file (YAML).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value, for a machine.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder that holds run directories.")]
Only = Annotated[
    str | None, typer.Option("--only", help="Only cases whose id matches: shell patterns, commas between.")
]
Backend = Annotated[
    str, typer.Option("--backend", help="Who starts the jobs: local, slurm, export, or replay:RUN_DIRECTORY.")
]
Site = Annotated[
    str | None, typer.Option("--site", help="The cluster for slurm and export: a site file, or the name of one.")
]
Box = Annotated[
    str,
    typer.Option("--box", help="Where their libraries come from: venv, docker, found, apptainer or pyxis."),
]


def placed(backend: str, site: str | None, runs: Path) -> tuple[str, Path]:
    """The backend with its site, and the folder for run directories: the site's own where none was named."""
    from harness import backends

    if site is None:
        return backend, runs
    if backend not in backends.OF_A_SITE:
        raise HarnessError(f"--site means nothing to --backend {backend}", "say `--backend slurm --site NAME`")
    # A run directory remembers its backend, and is cancelled from another folder as well.
    site = str(Path(site).absolute()) if Path(site).is_file() else site
    shared = backends.shared_runs(f"{backend}:{site}")
    return f"{backend}:{site}", shared if runs == Path("runs") and backend == "slurm" else runs


def console(stderr: bool = False) -> Console:
    """The terminal, without guesses at what to colour."""
    from rich.console import Console

    return Console(highlight=False, stderr=stderr)


def show_parts(*parts: RenderableType) -> None:
    """Print each part."""
    out = console()
    for part in parts:
        out.print(part)


def print_json(value: Any) -> None:
    """Print one JSON value."""
    print(json.dumps(value, indent=1, ensure_ascii=False))
