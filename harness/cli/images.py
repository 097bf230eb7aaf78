"""Verbs about pinned software: build, verify, fetch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.common import Json, app, console, print_json

if TYPE_CHECKING:
    from harness.containers import build as builds
    from harness.containers import verify as verifying


@app.command()
def build(
    environment: Annotated[str | None, typer.Argument(help="train or serve; both where it is left out.")] = None,
    variant: Annotated[str, typer.Option("--variant", help="cuda or cpu.")] = "cuda",
    arch: Annotated[
        list[str] | None,
        typer.Option("--arch", help="Compute capability to compile kernels for, such as 9.0; may be repeated."),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Another base image, by digest: NAME@sha256:...")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Compilers at once, each of up to 5 GB.")] = 2,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", help="Build no image: write what a host with neither network nor Engine needs here."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build the container images of the locked environments, and note them in images/images.lock."""
    from harness.containers import build as builds

    requests = builds.requests(environment, variant, arch, base, jobs)
    say = _quietly if as_json else _progress()
    if bundle is not None:
        _bundle(requests, bundle, say, as_json)
        return
    built = [builds.build(request, builds.CHECKOUT, say) for request in requests]
    if as_json:
        print_json([json.loads(one.model_dump_json()) for one in built])
    else:
        for one in built:
            console().print(_built_line(one), soft_wrap=True)


def _bundle(requests: tuple[builds.Request, ...], to: Path, say: builds.Say, as_json: bool) -> None:
    from harness.containers import bundle as bundling
    from harness.containers.build import CHECKOUT

    made = bundling.bundle(requests, CHECKOUT, to, say)
    if as_json:
        print(made.model_dump_json(indent=1))
        return
    out = console()
    out.print(f"{made.folder}: {made.files} wheels, {made.size_bytes / 1e9:.2f} GB", soft_wrap=True)
    for name in made.environments:
        out.print(f"{name}: copy the folder to the host, then python3 install.py there")
    for name in made.images:
        out.print(f"{name}: comes as an image, images/{name}.tar (docker load, or apptainer build docker-archive:)")


def _quietly(line: str) -> None:
    """Say nothing."""


def _progress() -> builds.Say:
    """Each line of a build as it comes, dimmed where that can be seen."""
    from rich.text import Text

    out = console()
    return lambda line: out.print(Text(line, style="dim"), soft_wrap=True)


def _built_line(built: builds.Built) -> str:
    state = "unchanged" if built.unchanged else "built"
    size = built.image.size_bytes / 1e9
    return f"{built.name}: {state}, {built.image.image}, {size:.2f} GB, {built.seconds:.0f} s"


@app.command()
def verify(
    image: Annotated[str, typer.Argument(help="train-cpu, train-cuda, serve-cpu, serve-cuda, or an image's id.")],
    as_json: Json = False,
) -> int:
    """Start an image, import all that is in it, and say where it differs from its lock."""
    from harness.containers import verify as verifying
    from harness.containers.build import CHECKOUT

    verdict = verifying.verify(image, CHECKOUT)
    if as_json:
        print(verdict.model_dump_json(indent=1))
    else:
        _show_verdict(verdict)
    return 0 if verdict.ok else 1


def _show_verdict(verdict: verifying.Verdict) -> None:
    from rich.table import Table

    out = console()
    out.print(f"{verdict.name} {verdict.image}", soft_wrap=True)
    out.print(f"Python {verdict.python}, {verdict.packages} packages, {verdict.imported} modules imported")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("check", "state", "detail"):
        table.add_column(heading, overflow="fold")
    for check in verdict.checks:
        table.add_row(check.what, check.state, check.detail)
    out.print(table)
    for line in verdict.without_gpu:
        out.print(f"not checked here: {line}", soft_wrap=True)


@app.command()
def fetch(
    variant: Annotated[str, typer.Argument(help="A variant of the catalog, such as nano-9b-v2.")],
    revision: Annotated[str | None, typer.Option("--revision", help="A branch, tag or commit; default: main.")] = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Into this folder, for `weights: FOLDER`; default: the hub's cache.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch a variant's weights and tokenizer ahead of time; runs themselves have no network."""
    from harness import fetch as fetching

    found = fetching.fetch(variant, revision, to, _quietly if as_json else _progress())
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        console().print(f"{found.checkpoint} at {found.commit}: {found.bytes / 1e9:.2f} GB in {found.path}",
                        soft_wrap=True)  # fmt: skip
