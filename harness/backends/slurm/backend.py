"""Submits jobs to Slurm, watches all of them with one call, and says how each ended."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from harness.backends import durable, files
from harness.backends.slurm import outcome as ends
from harness.backends.slurm import script, site
from harness.backends.slurm.client import Client, Seen, Silent
from harness.errors import HarnessError
from harness.schema import Command, EnvironmentName, Job, Outcome, Ticket

INTENT_FILE = "submit.json"
SCRIPT_FILE = "job.sbatch"
END_S = 90.0
"""How long `reap` waits for what it cancelled; Slurm's KillWait is 30 s by default."""
PASSED_ON = ("PYTHONPATH", "HF_HOME", "HF_HUB_CACHE")
"""Variables of a box that a node gets even where they are this process's own."""


def open_backend(argument: str) -> Slurm:
    """The backend for the site of that name or path; HarnessError where its file is wrong."""
    return Slurm(site.load(argument), str(site.path_of(argument)))


def _refuse_unshared(place: site.Site, run_dir: Path) -> None:
    """HarnessError where the nodes would not see the run directory."""
    if not run_dir.resolve().is_relative_to(Path(place.runs).resolve()):
        raise HarnessError(f"{run_dir} does not lie below {place.runs}, which the site's nodes share",
                           f"leave --runs out, or give a folder below {place.runs}")  # fmt: skip


class Slurm:
    """Starts jobs on a cluster; they go on when this process ends, and another one adopts them."""

    name = "slurm"
    outlives = True
    by_hand = False

    def __init__(self, place: site.Site, argument: str, client: Client | None = None) -> None:
        self.site = place
        self.argument = argument
        self.client = client or Client()
        self.at_once: int = place.max_queued
        self.pause_s = min(2.0, place.poll_s)
        self._missing_since: dict[str, float] = {}
        self._ended: set[str] = set()
        self._looked_at = 0.0

    # ------------------------------------------------------------ before a job

    def lacking(self, job: Job) -> str | None:
        """Why this site cannot run the job, in a sentence; `None` where it can."""
        place, per_node = self.site, job.devices // job.nodes
        if job.nodes > place.nodes:
            return f"needs {job.nodes} nodes; the site gives a job at most {place.nodes}"
        most = place.gpus_per_node if job.device == "cuda" else place.cpus_per_node
        if most is not None and per_node > most:
            what = "GPUs" if job.device == "cuda" else "ranks"
            return f"needs {per_node} {what} on a node; a node of the site has {most}"
        if place.max_time_limit_s is not None and job.time_limit_s > place.max_time_limit_s:
            return f"may take {job.time_limit_s:g} s; the site ends a job after {place.max_time_limit_s:g} s"
        if job.local_artifacts and not place.scratch:
            return "checkpoints: local needs a disk of the node; the site file names none (scratch)"
        if place.images and job.environment not in place.images:
            return f"needs an image for {job.environment}; the site file names none"
        return None

    def box(self) -> tuple[str, dict[EnvironmentName, str], tuple[str, ...]]:
        """The box that the site's nodes have: its name, its images and the host paths it sees."""
        return self.site.runtime, dict(self.site.images), self.site.mounts

    def order(self, job: Job, command: Command, job_dir: Path, name: str) -> script.Order:
        """What the script of a job is made from."""
        container, argv = _container(command.argv)
        return script.Order(
            job=job,
            argv=argv,
            env=_exported(command.env),
            container=container,
            job_dir=str(job_dir),
            name=name,
            site=self.site,
            exclude=ends.excluded(job_dir, job.id),
        )

    # ------------------------------------------------------------ submission

    def submit(self, job: Job, command: Command, job_dir: Path) -> Ticket:
        """Queue the job; HarnessError where the directory was used before, or Slurm refuses it."""
        files.refuse_used(job_dir)
        folder = job_dir.resolve()
        name = f"{job_dir.name}-{uuid.uuid4().hex[:12]}"
        try:
            files.lay(job, folder)
            order = self.order(job, command, folder, name)
            durable.write_atomically(str(folder / SCRIPT_FILE), script.text(order), mode=0o700)
            intent = {"name": name, "job_id": job.id, "t": time.time()}
            durable.write_atomically(str(folder / INTENT_FILE), json.dumps(intent) + "\n")
        except OSError as error:
            raise files.cannot_start(job_dir, error) from error
        try:
            number = self.client.submit(SCRIPT_FILE, name, str(folder))
        except HarnessError as error:
            if order.exclude:  # no other node is left to try it on: that is this attempt's outcome
                return self._refused(job, folder, order.exclude, error)
            raise
        return self._ticket(job.id, folder, name, number)

    def _ticket(self, job_id: str, folder: Path, name: str, number: str) -> Ticket:
        handle = {"job": number, "name": name, "site": self.argument}
        ticket = Ticket(backend=self.name, job_id=job_id, job_dir=str(folder), submitted_at=time.time(), handle=handle)
        files.write_ticket(ticket)
        return ticket

    def _refused(self, job: Job, folder: Path, exclude: tuple[str, ...], error: HarnessError) -> Ticket:
        ticket = self._ticket(job.id, folder, "", "")
        detail = f"not queued again without {', '.join(exclude)}: {error.message}"
        now = time.time()
        _write(ticket, Outcome(node_failed=True, failed_hosts=exclude, start=now, end=now, detail=detail))
        return ticket

    # ------------------------------------------------------------ watching

    def poll(self, tickets: Sequence[Ticket]) -> set[str]:
        """Ids of the jobs that have ended; looks at the queue at most every `poll_s`."""
        waiting = [ticket for ticket in tickets if ticket.job_dir not in self._ended]
        for ticket in waiting:
            if files.outcome_path(ticket).exists():
                self._ended.add(ticket.job_dir)
        waiting = [ticket for ticket in waiting if ticket.job_dir not in self._ended]
        if waiting and time.monotonic() - self._looked_at >= self.site.poll_s:
            self._looked_at = time.monotonic()
            with contextlib.suppress(Silent):  # nothing is known just now, least of all that a job is lost
                self._look(waiting)
        return {ticket.job_id for ticket in tickets if ticket.job_dir in self._ended}

    def _look(self, waiting: Sequence[Ticket]) -> None:
        queue = self.client.queue()
        gone = []
        for ticket in waiting:
            seen = queue.get(ticket.handle["job"])
            if seen is None:
                gone.append(ticket)
            elif ends.final(seen):
                self._settle(ticket, seen)
        if gone:
            self._find(gone)

    def _find(self, gone: Sequence[Ticket]) -> None:
        """Jobs that have left the queue's memory: accounting knows them, or the script's own last word."""
        known = self._accounted([ticket.handle["job"] for ticket in gone])
        for ticket in gone:
            seen = known.get(ticket.handle["job"])
            since = self._missing_since.setdefault(ticket.job_dir, time.monotonic())
            if ends.final(seen) or (seen is None and ends.ended(Path(ticket.job_dir))):
                self._settle(ticket, seen)
            elif seen is None and time.monotonic() - since >= self.site.lost_after_s:
                self._settle(ticket, None)

    def _accounted(self, ids: Sequence[str]) -> dict[str, Seen]:
        return self.client.accounted(ids) if self.site.accounting else {}

    def _settle(self, ticket: Ticket, seen: Seen | None) -> None:
        """Note that a job has ended, and how: its outcome stands from here on."""
        folder = Path(ticket.job_dir)
        begun = ends.started(folder)
        nodes = (seen.nodes if seen else "") or (begun.nodes if begun else "")
        hosts = self.client.names(nodes)
        lost_node = seen is not None and seen.state in ("NODE_FAIL", "BOOT_FAIL")
        failed = (self.client.down(nodes) or hosts) if lost_node else ()
        ends.name_rank_logs(folder)
        _write(ticket, ends.judge(ticket, seen, hosts, failed))
        self._ended.add(ticket.job_dir)

    def collect(self, ticket: Ticket) -> Outcome:
        """The outcome of an ended job; HarnessError where it is still at work."""
        if files.read_outcome(ticket) is None and ticket.job_id not in self.poll([ticket]):
            raise HarnessError(f"job {ticket.job_id} is still at work", "poll until it has ended")
        unreadable = Outcome(lost=True, start=ticket.submitted_at, end=time.time(), detail="its outcome does not read")
        return files.read_outcome(ticket) or unreadable

    # ------------------------------------------------------------ ending

    def cancel(self, ticket: Ticket) -> None:
        """Ask Slurm to end a job as interrupted; one that has ended stays as it is."""
        if not files.outcome_path(ticket).exists():
            self._cancel([ticket])

    def _cancel(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            durable.write_atomically(str(Path(ticket.job_dir) / ends.CANCELLED_FILE), f"{time.time():.0f}\n")
        try:
            self.client.cancel([ticket.handle["job"] for ticket in tickets])
        except Silent as error:
            raise HarnessError(f"the Slurm controller does not answer: {error}", "give the command again") from None

    def adopt(self, run_dir: Path) -> list[str]:
        """Find again what an earlier control plane submitted, also where it ended before it had noted the job's id."""
        _refuse_unshared(self.site, run_dir)
        lines = list(self._recover(run_dir))
        at_work = len(_open_tickets(run_dir))
        if at_work:
            lines.append(f"{at_work} job{'s' if at_work > 1 else ''} of this run went on without a harness: taken up")
        return lines

    def _recover(self, run_dir: Path) -> Iterator[str]:
        """Tickets for submissions that have none: by the script's word, the queue, then accounting."""
        lost = _open_intents(run_dir)
        if not lost:
            return
        names = [str(intent["name"]) for intent in lost.values()]
        try:
            found = self.client.by_name(names)
            missing = [name for name in names if name not in found]
            if missing and self.site.accounting:
                oldest = min(float(str(intent["t"])) for intent in lost.values())
                found |= self.client.accounted_by_name(missing, oldest)
        except Silent as error:
            raise HarnessError(f"the Slurm controller does not answer: {error}", "run again later") from None
        for folder, intent in lost.items():
            begun = ends.started(folder)
            number = begun.job if begun else found.get(str(intent["name"]))
            if number:
                self._ticket(str(intent["job_id"]), folder, str(intent["name"]), number)
                yield f"{folder.name} had been submitted as Slurm job {number}: found again"

    def reap(self, run_dir: Path) -> list[str]:
        """End every job of `run_dir` that was submitted and has no outcome; one line for each."""
        lines = list(self._recover(run_dir))
        tickets = _open_tickets(run_dir)
        if tickets:
            self._cancel(tickets)
        deadline = time.monotonic() + END_S
        left = tickets
        while left and time.monotonic() < deadline:
            ended = self.poll(left)
            left = [ticket for ticket in left if ticket.job_id not in ended]
            time.sleep(0.2 if left else 0)
        still = {ticket.job_dir for ticket in left}
        for ticket in tickets:
            what = "does not end yet; Slurm was told to end it" if ticket.job_dir in still else "was ended"
            lines.append(f"{Path(ticket.job_dir).name} (Slurm job {ticket.handle['job']}) {what}")
        return lines


# ---------------------------------------------------------------- files and environment


def _write(ticket: Ticket, found: Outcome) -> None:
    if not files.outcome_path(ticket).exists():
        durable.write_atomically(str(files.outcome_path(ticket)), found.model_dump_json(indent=1) + "\n")


def _open_tickets(run_dir: Path) -> list[Ticket]:
    """Tickets of Slurm jobs that have no outcome, with the directory where they lie now."""
    found = []
    for path in sorted(run_dir.glob("jobs/*/ticket.json")):
        with contextlib.suppress(OSError, ValidationError):
            ticket = Ticket.model_validate_json(path.read_bytes())
            ticket = ticket.model_copy(update={"job_dir": str(path.parent.resolve())})
            if ticket.backend == Slurm.name and not files.outcome_path(ticket).exists():
                found.append(ticket)
    return found


def _open_intents(run_dir: Path) -> dict[Path, dict[str, object]]:
    """By directory, submissions that were begun and have neither ticket nor outcome."""
    found: dict[Path, dict[str, object]] = {}
    for path in sorted(run_dir.glob(f"jobs/*/{INTENT_FILE}")):
        folder = path.parent.resolve()
        if not any((folder / name).exists() for name in ("ticket.json", "ticket.disowned.json", "outcome.json")):
            with contextlib.suppress(OSError, ValueError):
                intent = json.loads(path.read_text())
                if {"name", "job_id", "t"} <= intent.keys():
                    found[folder] = intent
    return found


def _exported(env: dict[str, str]) -> dict[str, str]:
    """Of a job's environment what a node cannot know: what is this login node's own stays here."""
    found = {}
    for name, value in env.items():
        own = os.environ.get(name)
        if name == "PATH" and own and value.endswith(f":{own}"):
            found[name] = f"{value.removesuffix(own)}${{PATH}}"
        elif value != own or name in PASSED_ON:
            found[name] = value
    return found


def _container(argv: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """srun's container options and the rest of a command that the pyxis box made."""
    if not argv or argv[0] != "srun":
        return (), argv
    split = next(
        index for index, part in enumerate(argv[1:], 1) if not part.startswith(("--container", "--no-container"))
    )
    return argv[1:split], argv[split:]
