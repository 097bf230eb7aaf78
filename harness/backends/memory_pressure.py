"""Whether the kernel killed a process for want of host memory. Standard library only."""

from __future__ import annotations

import contextlib
import os
import re

LOG_TAIL_BYTES = 65_536
_SAID = re.compile(rb"SIGKILL|exit ?code *:? *-9\b")
"""How torchrun, Python's subprocess and vLLM tell of a killed child: they wait for it themselves, so we cannot."""
_KERNEL_SAID = re.compile(rb"Killed process (\d+)")
_COUNTED = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def _counter_files() -> list[str]:
    """Where the kernel counts such kills: this process's memory cgroup (version 2 or 1), and the host."""
    found = ["/proc/vmstat"]
    with contextlib.suppress(OSError), open("/proc/self/cgroup") as file:
        for line in file:
            _, controllers, path = line.strip().split(":", 2)
            if controllers == "":
                found.append(f"/sys/fs/cgroup{path}/memory.events")
            elif controllers == "memory":
                found.append(f"/sys/fs/cgroup/memory{path}/memory.oom_control")
    return found


def kills(files: list[str] | None = None) -> dict[str, int]:
    """Kills for want of memory so far, by the file that counts them."""
    found = {}
    for path in _counter_files() if files is None else files:
        with contextlib.suppress(OSError), open(path) as file:
            if match := _COUNTED.search(file.read()):
                found[path] = int(match[1])
    return found


def rose(before: dict[str, int], after: dict[str, int]) -> bool:
    """Whether any counter went up between two looks."""
    return any(count > before.get(path, count) for path, count in after.items())


def kill_reported(job_dir: str) -> bool:
    """Whether the end of the job's error output tells of a child that was killed by SIGKILL."""
    with contextlib.suppress(OSError), open(os.path.join(job_dir, "stderr.log"), "rb") as file:
        file.seek(max(0, os.path.getsize(file.fileno()) - LOG_TAIL_BYTES))
        return bool(_SAID.search(file.read()))
    return False


def killed_pids() -> set[int]:
    """Pids that the kernel's log names as killed for want of memory; empty where it is not ours to read."""
    found: set[int] = set()
    with contextlib.suppress(OSError):  # one read gives one record, and none is left once it would block
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        try:
            while record := os.read(log, 8192):
                found.update(int(pid) for pid in _KERNEL_SAID.findall(record))
        finally:
            os.close(log)
    return found
