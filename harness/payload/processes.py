"""The processes of one session, through /proc: who they are, their memory, ending them all. Standard library only.

A server is started in a session of its own. Its children may outlive it, change their title and lose their parent, but
they keep the session.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from pathlib import Path

PROC = Path("/proc")
SHARED = Path("/dev/shm")
_PSM = re.compile(rb"/dev/shm/(psm_\w+)")


def in_session(session: int) -> list[int]:
    """Living processes (zombies left out) of `session`."""
    return [pid for pid in _pids() if _living_session(pid) == session]


def rss_bytes(pids: list[int]) -> int:
    """Sum of the resident sets; pages that processes share count once for each."""
    return sum(_pages(pid) for pid in pids) * os.sysconf("SC_PAGE_SIZE")


def shared_memory(pids: list[int]) -> set[str]:
    """Names in /dev/shm of the `psm_*` segments (Python's shared memory) that these processes map."""
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found |= {name.decode() for name in _PSM.findall((PROC / str(pid) / "maps").read_bytes())}
    return found


def end(session: int, leader_grace_s: float, *, kill_wait_s: float = 10.0) -> list[int]:
    """End every process of `session`: SIGTERM, after the grace SIGKILL. Returns what had to be killed.

    The leader alone gets the SIGTERM where it lives, because it ends its children in order; RuntimeError names what
    even SIGKILL did not end.
    """
    members = in_session(session)
    _signal([session] if session in members else members, signal.SIGTERM)
    left = _wait_gone(session, leader_grace_s)
    _signal(left, signal.SIGKILL)
    if survivors := _wait_gone(session, kill_wait_s):
        raise RuntimeError(f"processes {survivors} are still there after SIGKILL")
    return left


def remove_shared(names: set[str]) -> list[str]:
    """Remove those segments that are still there; their names."""
    removed = []
    for name in sorted(names):
        with contextlib.suppress(FileNotFoundError):
            (SHARED / name).unlink()
            removed.append(name)
    return removed


class PeakMemory:
    """Samples the RSS of a session in a thread, twice a second, and remembers the shared memory seen."""

    def __init__(self, session: int, interval_s: float = 0.5) -> None:
        self.peak_rss_bytes = 0
        self.segments: set[str] = set()
        self._session = session
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        samples = 0
        while not self._stop.wait(self._interval_s):
            members = in_session(self._session)
            self.peak_rss_bytes = max(self.peak_rss_bytes, rss_bytes(members))
            if samples % 10 == 0:  # maps are long: look every few seconds, in case the server is killed from outside
                self.segments |= shared_memory(members)
            samples += 1

    def stop(self) -> None:
        """End the thread; the peak stands."""
        self._stop.set()
        self._thread.join(timeout=10)


def _pids() -> list[int]:
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]


def _living_session(pid: int) -> int | None:
    """The session of a living process; the command name in front may hold spaces and parentheses."""
    try:
        fields = (PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[3]) if fields[0] not in (b"Z", b"X") else None


def _pages(pid: int) -> int:
    try:
        return int((PROC / str(pid) / "statm").read_bytes().split()[1])
    except (OSError, IndexError):
        return 0


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _wait_gone(session: int, seconds: float) -> list[int]:
    """Who is left of `session` after at most `seconds`."""
    until = time.monotonic() + seconds
    while (left := in_session(session)) and time.monotonic() < until:
        time.sleep(0.1)
    return left
