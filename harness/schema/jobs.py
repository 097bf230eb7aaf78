"""What is started: jobs, commands, tickets, and how they ended."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

from harness.schema.base import Frozen
from harness.schema.cases import DeviceType

EnvironmentName = Literal["train", "serve"]


class Mount(Frozen):
    """A host path that a job needs besides its own directory."""

    path: str
    writable: bool = False


RENDEZVOUS = ("{head}", "{port}", "{meeting}", "{node_rank}", "{node}")
"""Address of the first node, a port on it, a word that all nodes of the job share, this node's number and name."""


class Job(Frozen):
    """One process group to start: argv for inside a box, and what it may use.

    `argv[0]` is the bare name `python`; a box puts the interpreter of its environment there. The working directory is
    the job's own directory, which is also the only place it writes to; `payload` is written there as `job.json`.
    On several nodes `argv` may hold the words of `RENDEZVOUS`, which a backend that spans nodes fills in on each.
    """

    id: str
    environment: EnvironmentName
    case_ids: tuple[str, ...]
    argv: tuple[str, ...]
    env: dict[str, str]
    mounts: tuple[Mount, ...] = ()
    device: DeviceType
    devices: int
    """Of all nodes together."""
    nodes: int = 1
    """Hosts to spread them over evenly; on more than one, the launcher runs once on each of them."""
    time_limit_s: float
    stall_s: float
    host_memory_gib: float | None = None
    """What all of it together may use of a host's memory, where its box or backend can hold it to that."""
    local_artifacts: bool = False
    """Its `artifacts` lie on a disk of the host, not in the job directory."""
    files: dict[str, str] = {}
    """Small text files to lay into the job directory before the start, by relative name."""
    payload: dict[str, JsonValue]
    """The content of `job.json`, all that the payload reads."""


class Command(Frozen):
    """A job inside its box: what a backend starts."""

    argv: tuple[str, ...]
    env: dict[str, str]
    """The whole environment, not an addition to one."""
    cwd: str
    cleanup: tuple[str, ...] = ()
    """argv that ends and removes what the command started outside its own process tree, such as a container; a backend
    runs it, in `env`, at every end. It may print one JSON object with fields of an `Outcome`, as it saw the end."""


class Ticket(Frozen):
    """A started job, on disk before `submit` returns."""

    backend: str
    job_id: str
    job_dir: str
    submitted_at: float
    handle: dict[str, str]
    """What the backend needs to find it again: a pid and its start time, a Slurm job id, a container id."""


class Outcome(Frozen):
    """How a job ended, as its backend saw it."""

    exit_code: int | None = None
    """`None` where a signal ended it or nothing is known."""
    signal: int | None = None
    timed_out: bool = False
    stalled: bool = False
    host_oom_killed: bool = False
    interrupted: bool = False
    """Ended from outside: Ctrl-C, `cancel`, or the control plane died."""
    lost: bool = False
    """The supervisor is gone and left no word; neither a scheduler's queue nor its accounting knows the job."""
    node_failed: bool = False
    """A scheduler ended it because a node did not answer any more; `failed_hosts` are to be avoided."""
    preempted: bool = False
    """A scheduler took its place for a job of higher priority."""
    cancelled: bool = False
    """A person ended it with the scheduler's own means, past this program."""
    scheduler_state: str | None = None
    """The scheduler's own word for the end, such as TIMEOUT."""
    scheduler_job: str | None = None
    """The scheduler's id of the job."""
    hosts: tuple[str, ...] = ()
    """Nodes that a scheduler gave it, by the scheduler's names."""
    failed_hosts: tuple[str, ...] = ()
    start: float
    """Unix seconds."""
    end: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Ended by itself with exit code 0."""
        taken = self.interrupted or self.lost or self.node_failed or self.preempted or self.cancelled
        return self.exit_code == 0 and not (self.timed_out or self.stalled or taken)
