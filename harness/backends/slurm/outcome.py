"""How a Slurm job ended: the scheduler's word and the script's own, as one `Outcome`. Pure but for reading files."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from harness import events
from harness.backends.slurm.client import Seen
from harness.schema import Frozen, Outcome, Ticket

AT_WORK = frozenset(
    {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED",
     "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
)  # fmt: skip
"""States of a job that has not ended; any other is final (squeue's manual page, `JOB STATE CODES`)."""
CANCELLED_FILE = "cancelled.txt"
"""Made by `cancel`: an end that this program asked for."""
LOG_BYTES = 65_536


class Started(Frozen):
    """What `started.txt` says."""

    job: str
    nodes: str
    at: float


class Ended(Frozen):
    """What `ended.txt` says."""

    how: str
    """`ended`, `time_limit`, `stalled` or `terminated`."""
    exit_code: int
    at: float


def started(job_dir: Path) -> Started | None:
    """The script's first word, `None` before it; a cut line is none."""
    with contextlib.suppress(OSError, ValueError):
        job, nodes, at = (job_dir / "started.txt").read_text(errors="replace").split()
        return Started(job=job, nodes=nodes, at=float(at))
    return None


def ended(job_dir: Path) -> Ended | None:
    """The script's last word, `None` where it could not write one."""
    with contextlib.suppress(OSError, ValueError):
        how, exit_code, at = (job_dir / "ended.txt").read_text(errors="replace").split()
        return Ended(how=how, exit_code=int(exit_code), at=float(at))
    return None


def final(seen: Seen | None) -> bool:
    """Whether the scheduler says that the job has ended."""
    return seen is not None and seen.state not in AT_WORK


def judge(ticket: Ticket, seen: Seen | None, hosts: tuple[str, ...], failed_hosts: tuple[str, ...]) -> Outcome:
    """What came of a job that has ended, or that nobody knows any more (`seen` is `None`)."""
    folder = Path(ticket.job_dir)
    begun, word = started(folder), ended(folder)
    state = seen.state if seen else None
    facts = {
        "start": begun.at if begun else ticket.submitted_at,
        "end": word.at if word else time.time(),
        "scheduler_job": ticket.handle["job"],
        "scheduler_state": state,
        "hosts": hosts,
        "failed_hosts": failed_hosts,
    }
    how = _how(folder, state, word, starved=bool(seen and seen.out_of_memory) or _oom_in_log(folder))
    if not {"interrupted", "lost", "node_failed", "preempted", "cancelled", "timed_out", "stalled"} & how.keys():
        facts["exit_code"] = word.exit_code if word else (seen.exit_code if seen else None)
        if facts["exit_code"] == 0 and state not in (None, "COMPLETED"):
            facts["exit_code"] = None  # the launcher's word is older than the scheduler's
    return Outcome.model_validate(facts | how | {"detail": _detail(ticket, seen, word, hosts, failed_hosts)})


def _how(folder: Path, state: str | None, word: Ended | None, *, starved: bool) -> dict[str, bool]:
    """The flags of the outcome; the scheduler's word goes before the script's."""
    ours = (folder / CANCELLED_FILE).exists()
    if word and word.how == "ended" and state in (None, "COMPLETED", "FAILED", "COMPLETING"):
        return {"host_oom_killed": True} if starved and word.exit_code else {}
    if state == "CANCELLED" or (state is None and word and word.how == "terminated"):
        return {"interrupted": True} if ours else {"cancelled": True}
    if state in ("NODE_FAIL", "BOOT_FAIL"):
        return {"node_failed": True}
    if state == "PREEMPTED":
        return {"preempted": True}
    if state == "OUT_OF_MEMORY":
        return {"host_oom_killed": True}
    if state in ("TIMEOUT", "DEADLINE") or (word and word.how == "time_limit"):
        return {"timed_out": True}
    if word and word.how == "stalled":
        return {"stalled": True}
    if word and word.how == "terminated":
        return {"interrupted": True} if ours else {"cancelled": True}
    if state is None:
        return {"interrupted": True} if ours else {"lost": True}
    return {"host_oom_killed": True} if starved else {}


def _oom_in_log(folder: Path) -> bool:
    """slurmstepd's own line on a kill for memory, in the batch script's log."""
    with contextlib.suppress(OSError), open(folder / "slurm.log", "rb") as file:
        file.seek(max(0, os.path.getsize(folder / "slurm.log") - LOG_BYTES))
        text = file.read()
        return b"oom-kill event" in text or b"oom_kill event" in text
    return False


def _detail(
    ticket: Ticket, seen: Seen | None, word: Ended | None, hosts: tuple[str, ...], failed_hosts: tuple[str, ...]
) -> str:
    where = f" on {', '.join(hosts)}" if hosts else ""
    state = seen.state if seen else "neither queue nor accounting know it"
    said = f"Slurm job {ticket.handle['job']}{where}: {state}"
    if seen and seen.reason not in ("", "None"):
        said += f" ({seen.reason})"
    if word and word.how != "ended":
        said += f"; its script ended it: {word.how.replace('_', ' ')}"
    if failed_hosts:
        said += f"; unfit for work: {', '.join(failed_hosts)}"
    return said


def name_rank_logs(job_dir: Path) -> None:
    """Give torchrun's logs on several nodes the rank and the host in their name: `logs/rank3.n2.stderr.log`.

    torchrun numbers them by node alone; which rank it was stands in the rank's own events.
    """
    for rank, path in events.files(str(job_dir)).items():
        start = _start_of(path)
        host, local = start.get("host"), start.get("local_rank")
        if not isinstance(host, str) or not isinstance(local, int) or "/" in host:
            continue
        for log in (job_dir / "logs" / host).glob(f"*/attempt_*/{local}/*.log"):
            with contextlib.suppress(OSError):
                log.rename(job_dir / "logs" / f"rank{rank}.{host}.{log.name}")


def _start_of(path: str) -> dict[str, object]:
    with contextlib.suppress(OSError):
        for _, event in events.read(path):
            if event and event["kind"] == "start":
                return event
    return {}


def excluded(job_dir: Path, job_id: str) -> tuple[str, ...]:
    """Nodes on which an earlier attempt at the job ended for the node's own fault."""
    found: dict[str, None] = {}
    for path in sorted(job_dir.parent.glob("*/outcome.json")):
        name, _, number = path.parent.name.rpartition(".")
        if name == job_id and number.isdigit():
            with contextlib.suppress(OSError, ValueError):
                found |= dict.fromkeys(json.loads(path.read_text()).get("failed_hosts", ()))
    return tuple(found)
