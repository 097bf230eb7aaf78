"""What is kept: the one result of a planned case, and where its numbers come from."""

from __future__ import annotations

from typing import Literal

from harness.schema.base import Frozen
from harness.schema.cases import Case
from harness.schema.jobs import EnvironmentName, Outcome
from harness.schema.ladders import LadderEnd, Rung
from harness.schema.observations import Observation
from harness.schema.verdicts import Diagnosis

Status = Literal["measured", "failed", "skipped"]

RUN_VERSION = 1
RECORD_VERSION = 1


class Environment(Frozen):
    """Where a job's libraries came from."""

    name: EnvironmentName
    box: str
    digest: str
    """`sha256:...` of what is installed, or of the image."""
    pinned: bool
    """False for the `found` box: shown as unpinned."""
    python: str
    libraries: dict[str, str]
    """Versions of what matters for a number."""


class Gpu(Frozen):
    """One GPU as its driver names it."""

    index: int
    name: str
    uuid: str
    total_bytes: int


class Provenance(Frozen):
    """Where a record's numbers come from."""

    number_kind: Literal["measured", "capped", "replayed", "predicted"]
    harness_version: str
    commit: str | None
    """Of the harness; ends in `+dirty` where the tree differed."""
    payload_sha256: str
    matrix_sha256: str
    backend: str
    environments: tuple[Environment, ...]
    hosts: tuple[str, ...]
    cpu: str
    cpu_count: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    weights: str
    """`random`, `hub@<commit>`, or `path`; `no` where the case has no model."""


class JobRun(Frozen):
    """One job of an attempt."""

    job_id: str
    environment: EnvironmentName
    dir: str
    """Relative to the run directory."""
    outcome: Outcome


class Attempt(Frozen):
    """One try at a case."""

    number: int
    jobs: tuple[JobRun, ...]
    observation: Observation
    diagnosis: Diagnosis | None = None
    """`None` exactly where the attempt measured what was asked."""
    log_tail: str = ""
    """Last lines of the job's output where it failed; scrubbed, and hostile to whoever renders it."""


class Record(Frozen):
    """The one result of a planned case."""

    version: int = RECORD_VERSION
    case_id: str
    case: Case
    status: Status
    skip_rule: str | None = None
    skip_reason: str | None = None
    attempts: tuple[Attempt, ...] = ()
    parent: str | None = None
    """Id of the case that a ladder or a search made this one from."""
    rung: Rung | None = None
    """How a ladder made this case from its parent."""
    frontier: str | None = None
    """The field whose largest fitting value a search looks for, with this case as one of its grid."""
    ladder_end: LadderEnd | None = None
    """Why the ladder that was asked for goes no further from here."""
    provenance: Provenance | None = None
    finished_at: float
    """Unix seconds."""

    @property
    def last(self) -> Attempt | None:
        """The attempt that decided the status."""
        return self.attempts[-1] if self.attempts else None
