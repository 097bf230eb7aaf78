"""Who starts a job, watches it and ends it: the only modules that act on the world.

A backend is one module here and one line in `REGISTRY`; `tests/test_backends.py` holds each of them to the same
contract. This file imports nothing but the standard library, because the supervisor of a job imports its neighbours
through it with an interpreter that knows no other library.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Protocol, cast

from harness.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from harness.schema import Command, Job, Outcome, Ticket


class Backend(Protocol):
    """Starts jobs and tells how they ended; a ticket on disk is all that another process needs to go on with one."""

    @property
    def name(self) -> str:
        """The word that `get` knows it by."""

    @property
    def at_once(self) -> int | None:
        """Most jobs submitted and not ended; `None`: as many as this host's devices take."""

    @property
    def outlives(self) -> bool:
        """Whether jobs go on when the control plane ends, for another one to adopt."""

    @property
    def by_hand(self) -> bool:
        """Whether a person has to start what was submitted, so that waiting for it makes no sense."""

    @property
    def pause_s(self) -> float:
        """How long at least to wait between two calls of `poll`."""

    def lacking(self, job: Job) -> str | None:
        """Why it cannot run the job at all, in a sentence; `None` where it can."""

    def adopt(self, run_dir: Path) -> list[str]:
        """Before a run goes on: see to what an earlier control plane left at work; lines for a person."""

    def submit(self, job: Job, command: Command, job_dir: Path) -> Ticket:
        """Lay `job.json` and the job's files, start `command`; `ticket.json` is on disk when it returns."""

    def poll(self, tickets: Sequence[Ticket]) -> set[str]:
        """Ids of the jobs that have ended; cheap enough for several times a second."""

    def collect(self, ticket: Ticket) -> Outcome:
        """How an ended job ended; its run files are in its directory and none of its processes lives."""

    def cancel(self, ticket: Ticket) -> None:
        """Ask a job to end as interrupted, from any process; returns at once, `poll` tells when it has."""

    def reap(self, run_dir: Path) -> list[str]:
        """End what an earlier control plane left at work and give each such job an outcome; lines for a person."""


REGISTRY = {
    "local": "harness.backends.local",
    "replay": "harness.backends.replay",
    "slurm": "harness.backends.slurm",
    "export": "harness.backends.slurm.export",
}
"""Module of each backend; it defines `open_backend(argument)`."""
OF_A_SITE = ("slurm", "export")
"""Backends whose argument is a cluster's site file."""


def get(name: str) -> Backend:
    """The backend of that name; what follows a colon is its argument, as in `replay:RUN_DIRECTORY`."""
    kind, _, argument = name.partition(":")
    if kind not in REGISTRY:
        near = difflib.get_close_matches(kind, REGISTRY, 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise HarnessError(f"there is no backend {kind!r}", f"{meant}known: {', '.join(REGISTRY)}")
    return cast("Backend", importlib.import_module(REGISTRY[kind]).open_backend(argument))


def shared_runs(name: str) -> Path:
    """The folder for run directories that a cluster's nodes share, as the site of the backend `name` says."""
    from pathlib import Path

    from harness.backends.slurm import site

    return Path(site.load(name.partition(":")[2]).runs)
