"""Stands by one job from its start to its outcome, and outlives whoever started it. Standard library only.

Run as `python -I supervisor.py JOB_DIR` in a session of its own, with a pipe from the control plane as standard input:
`go` on it starts the job, its end means that the control plane is gone. It reads `supervisor.json` (argv, env, cwd,
cleanup, time_limit_s, stall_s, mark) and leaves `outcome.json`, the last thing it does, once nothing of it is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from typing import Any

if __name__ == "__main__":  # started by path, with an interpreter that knows nothing of us
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from harness import events
from harness.backends import durable, memory_pressure, outside, processes, shared_memory, stall

TICK_S = 0.5
LOOK_ANEW_TICKS = 20
LINGER_S = 2.0
"""How long helpers of a job that has ended may take to end by themselves."""
GRACE_S = 5.0
"""From SIGTERM to SIGKILL."""
MEMORY_VICTIM = "500"
"""Added to the job's oom_score_adj, so that the kernel ends the job before its supervisor or a person's shell."""
DETAIL_CHARACTERS = 500
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass
class Ending:
    """How it ended; the fields of `schema.Outcome`."""

    start: float
    end: float = 0.0
    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    stalled: bool = False
    host_oom_killed: bool = False
    interrupted: bool = False
    lost: bool = False
    detail: str = ""


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


class Supervisor:
    """One job: started, watched, ended, reported."""

    def __init__(self, job_dir: str) -> None:
        self.job_dir = job_dir
        with open(os.path.join(job_dir, "supervisor.json"), encoding="utf-8") as file:
            self.order: dict[str, Any] = json.load(file)
        self.ending = Ending(start=time.time())
        self.outcome = durable.Reserved(os.path.join(job_dir, "outcome.json"))
        self.pids = durable.Lines(os.path.join(job_dir, "pids.log"))
        self.tree = processes.Tree(os.getpid())
        self.segments = shared_memory.Segments()
        self.memory_kills = memory_pressure.kills()
        self.child = 0
        self.child_status: int | None = None
        self.sigkill_seen = False
        self.asked_to_end = ""
        self.told_to_go = False
        self.ticks = 0
        self._wake = self._catch_signals()

    # ------------------------------------------------------------ waiting

    def _catch_signals(self) -> int:
        """Signals become bytes in a pipe, so that one `select` waits for them, the lifeline and the clock."""
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})  # blocked by who started us
        return reading

    def _asked(self, number: int, _frame: object) -> None:
        self.asked_to_end = self.asked_to_end or f"asked to end by {signal.Signals(number).name}"

    def _wait(self, seconds: float) -> None:
        """Until a signal, a word on the lifeline, a child's end, or the time is up."""
        watched = [self._wake] if self.asked_to_end else [self._wake, 0]
        ready, _, _ = select.select(watched, [], [], seconds)
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 4096)
        if 0 in ready:
            word = os.read(0, 4096)
            self.told_to_go = self.told_to_go or b"go" in word
            if not word:
                self.asked_to_end = self.asked_to_end or "the control plane is gone"

    def _collect_children(self) -> bool:
        """Wait for whatever has ended; False where no child is left, and so no descendant."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.child:
                self.child_status, self.ending.end = status, time.time()
            self.sigkill_seen |= os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

    # ------------------------------------------------------------ the life of a job

    def run(self) -> None:
        """From the word to go to the outcome."""
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        while not (self.told_to_go or self.asked_to_end):
            self._wait(TICK_S)
        if self.asked_to_end:
            self._end_as("interrupted", f"{self.asked_to_end} before the job began")
        elif self._start():
            try:
                self._watch()
                self._judge_memory()
            except Exception as error:  # a mistake of ours costs this job its result, but leaves nothing running
                self._end_as("lost", f"its supervisor failed: {error!r}")
                traceback.print_exc()
            self._end_tree()
        self.pids.close()
        self.ending.end = self.ending.end or time.time()
        self.ending.detail = self.ending.detail[:DETAIL_CHARACTERS]
        self.outcome.save(json.dumps(asdict(self.ending), indent=1) + "\n")

    def _start(self) -> bool:
        env = self.order["env"] | {outside.MARK: self.order["mark"]}
        me = os.getpid()
        self.ending.start = time.time()
        try:
            with self._log("stdout.log") as out, self._log("stderr.log") as err:
                child = subprocess.Popen(
                    self.order["argv"], env=env, cwd=self.order["cwd"], stdin=subprocess.DEVNULL, stdout=out,
                    stderr=err, start_new_session=True, preexec_fn=lambda: _prepare_child(me),
                )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            self.ending.exit_code, self.ending.detail = 127, f"could not be started: {error}"
            return False
        self.child = child.pid
        child.returncode = 0  # waited for in `_collect_children`, together with its orphans
        return True

    def _log(self, name: str) -> Any:
        return open(os.path.join(self.job_dir, name), "ab")

    def _watch(self) -> None:
        """Until the job ends, or has to."""
        begun = last = time.monotonic()
        idle_s, size = 0.0, self._events_size()
        self._record_tree()
        while True:
            self._collect_children()
            if self.child_status is not None:
                return self._report_child()
            if self.asked_to_end:
                return self._end_as("interrupted", self.asked_to_end)
            now = time.monotonic()
            if now - begun > self.order["time_limit_s"]:
                return self._end_as("timed_out", f"its time limit of {self.order['time_limit_s']:g} s was over")
            if now - last >= TICK_S:
                grown = self._events_size()
                # A host that slept or was stopped shows as one long tick, which is no sign of a stalled job.
                idle_s = 0.0 if grown != size else idle_s + min(now - last, 10 * TICK_S)
                size, last = grown, now
                self._record_tree()
            if idle_s > self.order["stall_s"]:
                stall.save(self.job_dir, self._at_work(), idle_s)
                return self._end_as("stalled", f"no rank wrote an event for {idle_s:.1f} s")
            self._wait(max(0.01, TICK_S - (time.monotonic() - last)))

    def _events_size(self) -> int:
        """Bytes of all ranks' events; -1 where a file vanished in between, which is a change too."""
        with contextlib.suppress(OSError):
            return sum(os.path.getsize(path) for path in events.files(self.job_dir).values())
        return -1

    def _end_as(self, how: str, detail: str) -> None:
        setattr(self.ending, how, True)
        self.ending.detail = detail
        self.ending.end = time.time()

    def _report_child(self) -> None:
        status = self.child_status or 0
        if os.WIFSIGNALED(status):
            self.ending.signal = os.WTERMSIG(status)
        else:
            self.ending.exit_code = os.WEXITSTATUS(status)

    def _judge_memory(self) -> None:
        """Killed for host memory: the kernel counted such a kill, and one of ours got a SIGKILL not from us."""
        failed = self.child_status is not None and self.ending.exit_code != 0
        if failed and memory_pressure.rose(self.memory_kills, memory_pressure.kills()):
            self.ending.host_oom_killed = (
                self.sigkill_seen
                or self.ending.exit_code == 128 + signal.SIGKILL
                or memory_pressure.kill_reported(self.job_dir)
                or bool(self.tree.known_pids & memory_pressure.killed_pids())
            )

    # ------------------------------------------------------------ its processes

    def _members(self) -> list[processes.Process]:
        """Every living process of the job."""
        self.tree.look(anew=True)
        return [member for member in self.tree.members.values() if not member.ended]

    def _at_work(self) -> list[processes.Process]:
        """The living processes that do the work: of a container those in it, and not the client that waits for it.

        That client passes signals on to the container's first process, which a request for stacks would kill.
        """
        members = self._members()
        if not self.order.get("cleanup"):
            return members
        client = {member.pid for member in members}
        return [process for process in outside.marked(self.order["mark"]) if process.pid not in client]

    def _record_tree(self) -> None:
        """Note what is new, for a `reap` that has to do without us."""
        self.ticks += 1
        fresh = self.tree.look(anew=self.ticks % LOOK_ANEW_TICKS == 0)
        lines = [f"process {process.pid} {process.start_ticks} {process.session}" for process in fresh]
        lines += [f"shared {inode} {name}" for name, inode in self.segments.look(self.tree.members).items()]
        self.pids.add(lines)

    def _still_there(self) -> list[processes.Process]:
        """What `processes.end` has to end; empty only where the kernel says that we have no descendant."""
        while self._collect_children():
            if found := self._members():
                return found
            time.sleep(0.005)  # ended but not yet ours to wait for, or changing parents while we looked
        return []

    def _end_tree(self) -> None:
        """No process of the job is left after this, nor shared memory that it made."""
        if self.child_status is not None:
            self._let_helpers_end()
        self._record_tree()
        left = processes.end(self._still_there, GRACE_S)
        if self.child_status is not None:
            self._report_child()
        if left:
            stuck = ", ".join(f"{process.name} (pid {process.pid}, state {process.state})" for process in left)
            self._add_detail(f"could not be ended, they wait inside the kernel: {stuck}")
        self._clean_up()
        removed = shared_memory.remove(self.segments.owned, processes.pids())
        if removed:
            self._add_detail(f"removed from /dev/shm: {', '.join(removed)}")

    def _clean_up(self) -> None:
        """Nothing that the job started outside our tree is left after this."""
        said = outside.clean_up(self.order)
        if self.child_status is not None and self.ending.exit_code != 0:
            self.ending.host_oom_killed |= said.get("host_oom_killed", False)
            self.ending.interrupted |= said.get("interrupted", False)
        if detail := said.get("detail"):
            self._add_detail(detail)

    def _let_helpers_end(self) -> None:
        deadline = time.monotonic() + LINGER_S
        while self._collect_children() and time.monotonic() < deadline:
            self._wait(0.05)
        if self._collect_children():
            names = sorted(f"{member.name} (pid {member.pid})" for member in self._members())
            self._add_detail(f"left processes behind, which were ended: {', '.join(names)}")

    def _add_detail(self, text: str) -> None:
        self.ending.detail = f"{self.ending.detail}; {text}" if self.ending.detail else text


def _prepare_child(supervisor: int) -> None:
    """In the child, before it becomes the job: it ends with us, and before us when memory runs out."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # not SIGKILL: a launcher then ends its ranks, a container client its box
    if os.getppid() != supervisor:
        os._exit(1)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(MEMORY_VICTIM)


if __name__ == "__main__":
    Supervisor(sys.argv[1]).run()
