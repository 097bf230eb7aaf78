"""Slurm's own programs, called through one place that counts the calls and gives no variable of ours away."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from harness.errors import HarnessError
from harness.schema import Frozen

CALL_S = 60.0
SUBMIT_PATIENCE_S = 900.0
"""How long a controller that does not answer is waited for when a job is to be submitted."""
KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "SLURM_CONF", "KRB5CCNAME", "XDG_RUNTIME_DIR")
"""Of our environment; without SBATCH_* and SQUEUE_*, which would quietly change what is asked."""
SILENT = re.compile(
    "unable to contact slurm controller|socket timed out|connection refused|connection timed out|zero bytes were"
    "|communication connection failure|slurm_load_jobs error: unexpected|resource temporarily unavailable"
    "|slurm temporarily unable to accept",
    re.IGNORECASE,
)
"""What Slurm's programs say when the controller is away, so that nothing is known of the request."""
FULL = re.compile("MaxSubmitJob|job limit", re.IGNORECASE)
"""A limit on submitted jobs, which will be free again."""
FIELDS = "JobID:|,State:|,exit_code:|,NodeList:|,Reason:|,Name:|"
ACCOUNTED = "JobID,State,ExitCode,NodeList,JobName"


class Seen(Frozen):
    """What the scheduler says of one job."""

    state: str
    """Slurm's word, such as COMPLETED or NODE_FAIL, without `by UID`."""
    exit_code: int | None = None
    nodes: str = ""
    """Slurm's own list, such as n[1-2]."""
    reason: str = ""
    name: str = ""
    out_of_memory: bool = False


class Silent(Exception):
    """The controller does not answer."""


@dataclass
class Client:
    """Calls Slurm's programs."""

    calls: int = 0
    """Of any of them, so far."""
    by_program: dict[str, int] = field(default_factory=dict)

    def call(self, *argv: str, cwd: str | None = None) -> str:
        """Standard output; `Silent` where the controller is away, HarnessError with Slurm's words for a refusal."""
        self.calls += 1
        self.by_program[argv[0]] = self.by_program.get(argv[0], 0) + 1
        env = {name: os.environ[name] for name in KEPT if name in os.environ}
        try:
            done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=CALL_S)
        except FileNotFoundError:
            raise HarnessError(
                f"there is no {argv[0]} on PATH", "work on a login node of the cluster, or `module load slurm`"
            ) from None
        except subprocess.TimeoutExpired:
            raise Silent(f"{argv[0]} did not answer within {CALL_S:g} s") from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
            if SILENT.search(done.stderr):
                raise Silent(said[-1])
            raise HarnessError(f"{argv[0]}: {said[-1]}", "Slurm refused it; mend the site file, or ask the site")
        return done.stdout

    # -- submission

    def submit(self, script: str, name: str, cwd: str) -> str:
        """Slurm's id of the new job; never submits twice what an earlier, unanswered call brought in."""
        deadline, pause_s, unsure = time.monotonic() + SUBMIT_PATIENCE_S, 1.0, False
        while True:
            try:
                if unsure and (found := self.by_name([name])):
                    return found[name]
                return self.call("sbatch", "--parsable", script, cwd=cwd).strip().split(";")[0]
            except Silent as error:
                unsure = True
                if time.monotonic() > deadline:
                    raise HarnessError(f"the Slurm controller does not answer: {error}", "run again later") from None
            except HarnessError as error:
                if not FULL.search(error.message) or time.monotonic() > deadline:
                    raise
            time.sleep(pause_s)
            pause_s = min(30.0, 2 * pause_s)

    def by_name(self, names: Sequence[str]) -> dict[str, str]:
        """Ids of the jobs with these names that the queue knows, ended ones included while it remembers them."""
        if not names:
            return {}
        text = self.call("squeue", "--me", "--states=all", "--noheader", f"--name={','.join(names)}", "-O", FIELDS)
        return {seen.name: job for job, seen in parse_queue(text).items()}

    # -- looks

    def queue(self) -> dict[str, Seen]:
        """All jobs of this user, those that ended a short while ago included, by id; one call."""
        return parse_queue(self.call("squeue", "--me", "--states=all", "--noheader", "-O", FIELDS))

    def accounted(self, ids: Iterable[str]) -> dict[str, Seen]:
        """What accounting says of these jobs; it lags behind the queue, and a job may be missing."""
        wanted = ",".join(ids)
        options = ("--noheader", "--parsable2", f"--format={ACCOUNTED}", f"--jobs={wanted}")
        return parse_accounting(self.call("sacct", *options)) if wanted else {}

    def accounted_by_name(self, names: Sequence[str], since_s: float) -> dict[str, str]:
        """Ids by name of jobs that accounting knows since that time (Unix seconds)."""
        since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since_s - 60))
        options = ("--noheader", "--parsable2", "--allocations", f"--format={ACCOUNTED}", f"--starttime={since}")
        found = parse_accounting(self.call("sacct", *options, f"--name={','.join(names)}")) if names else {}
        return {seen.name: job for job, seen in found.items()}

    def cancel(self, ids: Sequence[str]) -> None:
        """End these jobs; those that have ended already are no mistake."""
        if ids:
            self.call("scancel", "--quiet", *ids)

    def down(self, nodes: str) -> tuple[str, ...]:
        """Of a node list, the names of nodes that are not fit for work."""
        text = self.call("sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--format=%N|%T")
        return tuple(dict.fromkeys(name for name, state in _rows(text, 2) if unfit(state)))

    def names(self, nodes: str) -> tuple[str, ...]:
        """The node names that a list such as n[1-2] stands for; no call where it is a plain one."""
        if "[" not in nodes:
            return tuple(name for name in nodes.split(",") if name)
        return tuple(self.call("scontrol", "show", "hostnames", nodes).split())


def unfit(state: str) -> bool:
    """Whether a node in this state (sinfo's %T) is one to stay away from."""
    return bool(re.search(r"down|drain|fail|error|maint|power|unk|not_resp|\*", state.lower()))


def _rows(text: str, columns: int) -> list[list[str]]:
    """Lines of `columns` fields between bars; a line that was cut is left out."""
    rows = [line.strip().rstrip("|").split("|") for line in text.splitlines()]
    return [[cell.strip() for cell in row] for row in rows if len(row) == columns]


def parse_queue(text: str) -> dict[str, Seen]:
    """Output of `squeue -O` in `FIELDS`, cut anywhere: by job id."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == FIELDS.count("|") + 1 and cells[0].isdigit():
            job, state, status, nodes, reason, name = cells[:6]
            found[job] = Seen(state=word(state), exit_code=_wait_status(status), nodes=_plain(nodes), reason=reason,
                              name=name, out_of_memory=state.startswith("OUT_OF_ME"))  # fmt: skip
    return found


def parse_accounting(text: str) -> dict[str, Seen]:
    """Output of `sacct --parsable2` in `ACCOUNTED`, cut anywhere: by job id; steps add their out-of-memory kills."""
    found: dict[str, Seen] = {}
    starved = set()
    for cells in (line.split("|") for line in text.splitlines()):
        if len(cells) != ACCOUNTED.count(",") + 1:
            continue
        job, state, exit_code, nodes, name = (cell.strip() for cell in cells)
        if state.startswith("OUT_OF_ME"):
            starved.add(job.split(".")[0])
        if job.isdigit() and state:
            code = exit_code.split(":")[0]
            found[job] = Seen(state=word(state), exit_code=int(code) if code.isdigit() else None, nodes=_plain(nodes),
                              name=name)  # fmt: skip
    return {job: seen.model_copy(update={"out_of_memory": job in starved}) for job, seen in found.items()}


def word(state: str) -> str:
    """Slurm's state without what follows it: `CANCELLED by 1000`, `CANCELLED+`."""
    return re.split(r"[ +]", state.strip(), maxsplit=1)[0]


def _plain(nodes: str) -> str:
    return "" if nodes in ("(null)", "None assigned", "n/a") else nodes


def _wait_status(text: str) -> int | None:
    """squeue states an exit code as wait(2) does."""
    return int(text) >> 8 if text.isdigit() else None
