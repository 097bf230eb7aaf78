"""Processes as /proc shows them: who descends from whom, who still lives, and how to end them. Standard library only.

A pid alone is no name, since the kernel gives it to others later: a process is named by its pid and its start time.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
PAUSE_S = 0.05
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    """One process at the moment of a look; fields of /proc/PID/stat (see proc_pid_stat(5))."""

    pid: int
    start_ticks: int
    """Clock ticks from boot to its start: field 22."""
    parent: int
    session: int
    state: str
    """R running, S sleeping, D waiting where no signal reaches it, T stopped, Z ended but not waited for."""
    name: str
    cpu_ticks: int
    threads: int
    rss_bytes: int

    @property
    def key(self) -> tuple[int, int]:
        """What names it for as long as the host is up."""
        return self.pid, self.start_ticks

    @property
    def ended(self) -> bool:
        """It runs no more, and only waits to be waited for; a first thread alone may end before the others."""
        return self.state in "ZX" and self.threads <= 1


def read(pid: int) -> Process | None:
    """The process `pid`, `None` where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    opening, closing = text.index(b"("), text.rindex(b")")  # a name may itself hold brackets and spaces
    field = text[closing + 2 :].split()
    return Process(
        pid=pid,
        start_ticks=int(field[19]),
        parent=int(field[1]),
        session=int(field[3]),
        state=field[0].decode(),
        name=text[opening + 1 : closing].decode(errors="replace"),
        cpu_ticks=int(field[11]) + int(field[12]),
        threads=int(field[17]),
        rss_bytes=int(field[21]) * PAGE_BYTES,
    )


def pids() -> set[int]:
    """Every pid of this host (or of this container)."""
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def alive(pid: int, start_ticks: int) -> bool:
    """Whether exactly this process still runs."""
    process = read(pid)
    return process is not None and process.start_ticks == start_ticks and not process.ended


@functools.cache
def place() -> str:
    """Where pids and start times mean what they meant: this boot of this host, and the pid namespace."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"


def with_descendants(roots: Iterable[int], among: Iterable[Process]) -> list[Process]:
    """Of `among`, those with a pid in `roots` and all that descend from them."""
    children: dict[int, list[Process]] = {}
    by_pid = {}
    for process in among:
        children.setdefault(process.parent, []).append(process)
        by_pid[process.pid] = process
    found: dict[int, Process] = {}
    todo = [by_pid[pid] for pid in roots if pid in by_pid]
    while todo:
        process = todo.pop()
        if process.pid not in found:
            found[process.pid] = process
            todo += children.get(process.pid, [])
    return list(found.values())


def everything() -> list[Process]:
    """Every process there is, at one look."""
    return [process for pid in pids() if (process := read(pid))]


class Tree:
    """All that descends from this process, which has to be their subreaper so that none can leave.

    A look costs one listing of /proc and one read per pid that was not there at the look before.
    """

    def __init__(self, root: int) -> None:
        self.root = root
        self.members: dict[int, Process] = {}
        self._seen: set[int] = set()
        self._told: set[tuple[int, int]] = set()

    @property
    def known_pids(self) -> set[int]:
        """Pids of all members that any look saw."""
        return {pid for pid, _ in self._told}

    def look(self, *, anew: bool = False) -> list[Process]:
        """Members that no look returned yet; `anew` reads all pids again, in case one passed to another process."""
        now = pids()
        if anew:
            self._seen.clear()
            self.members.clear()
        fresh = [process for pid in now - self._seen if (process := read(pid))]
        self._seen = now
        self.members = {pid: member for pid, member in self.members.items() if pid in now}
        parents = {self.root, *self.members}
        tops = [process.pid for process in fresh if process.parent in parents]
        found = with_descendants(tops, fresh)
        self.members.update((process.pid, process) for process in found)
        untold = [process for process in found if process.key not in self._told]
        self._told.update(process.key for process in untold)
        return untold


def send(process: Process, number: int) -> bool:
    """Send a signal to exactly this process, never to another that has its pid by now; False where it is gone."""
    try:
        handle = os.pidfd_open(process.pid)  # from here on the pid cannot pass to another process unnoticed
    except OSError:
        return False
    try:
        now = read(process.pid)
        if now is None or now.key != process.key or now.ended:
            return False
        signal.pidfd_send_signal(handle, number)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def end(find: Callable[[], list[Process]], grace_s: float, limit_s: float = 30.0) -> list[Process]:
    """End whatever `find` finds until it finds nothing: SIGTERM once, after `grace_s` SIGKILL.

    Returns what is left `limit_s` after that: it waits inside the kernel (state D), where no signal reaches it.
    """
    begun = time.monotonic()
    asked: set[tuple[int, int]] = set()
    while found := find():
        waited_s = time.monotonic() - begun
        if waited_s > grace_s + limit_s:
            return found
        for process in found:
            if waited_s >= grace_s:
                send(process, signal.SIGKILL)
            elif process.key not in asked:
                send(process, signal.SIGTERM)
                send(process, signal.SIGCONT)  # a stopped process would never see the other one
                asked.add(process.key)
        time.sleep(PAUSE_S)
    return []


def environment(pid: int) -> set[bytes]:
    """The `NAME=value` entries a process was started with; empty where it may not be read or was overwritten."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return set(file.read().split(b"\0"))
    return set()


def working_directory(pid: int) -> str | None:
    """The working directory of a process, `None` where it may not be read."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/cwd")
    return None


def outputs(pid: int) -> list[str]:
    """Paths of the files that a process has as its standard output and error, and may write to."""
    found = []
    for number in (1, 2):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/fdinfo/{number}") as file:
            flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags:"))
            if flags & os.O_ACCMODE != os.O_RDONLY:
                found.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return found
