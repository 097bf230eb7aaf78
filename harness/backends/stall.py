"""What to save of a job that shows no sign of life, before it is ended. Standard library only.

Everything here is bounded in time, since whatever hung the job may hang the tools that look at it.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import signal
import stat
import subprocess
import time
from collections import Counter
from typing import Any

from harness import events
from harness.backends import durable, processes
from harness.backends.processes import Process

FILE = "stall.json"
STACKS_WAIT_S = 3.0
"""For faulthandler and the Flight Recorder to write; also the span over which CPU use is taken."""
DEVICE_TOOL_S = 20.0
RECORDER_DUMPS = "*nccl_trace_rank_*"
"""PyTorch's own default name (TORCH_NCCL_DEBUG_INFO_TEMP_FILE), in the job directory."""
MAX_THREADS = 2000


def save(job_dir: str, tree: list[Process], idle_s: float) -> None:
    """Write the ranks' stacks, `nvidia-smi.txt`, Flight Recorder dumps where they can be had, and `stall.json`."""
    before = {process.key: process.cpu_ticks for process in tree}
    last_events = _last_events(job_dir)
    asked = [process.pid for process in tree if _catches(process.pid, signal.SIGUSR1) and _signal(process)]
    pipes = _ask_recorders(job_dir)
    states = [_state(process) for process in tree]
    time.sleep(STACKS_WAIT_S)
    for entry, process in zip(states, tree, strict=True):
        entry["cpu_share"] = _cpu_share(process, before[process.key])
    found = {
        "t": time.time(),
        "idle_s": round(idle_s, 3),
        "last_events": last_events,
        "processes": states,
        "asked_for_stacks": asked,
        "stacks": _names(job_dir, "stacks.rank*.txt"),
        "recorder_pipes": pipes,
        "recorder_dumps": _names(job_dir, RECORDER_DUMPS) + _names(job_dir, os.path.join("*", RECORDER_DUMPS)),
        "device_state": _device_state(job_dir),
    }
    with contextlib.suppress(OSError):  # evidence is worth less than the outcome that follows
        durable.write_atomically(os.path.join(job_dir, FILE), json.dumps(found, indent=1))


def _signal(process: Process) -> bool:
    return processes.send(process, signal.SIGUSR1)


def _status(pid: int) -> dict[str, str]:
    """The lines of /proc/PID/status; empty where it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", errors="replace") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}
    return {}


def _catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal, which would otherwise kill it."""
    return bool(int(_status(pid).get("SigCgt", "0"), 16) >> (number - 1) & 1)


def _text(path: str, limit: int = 400) -> str:
    with contextlib.suppress(OSError), open(path, errors="replace") as file:
        return file.read(limit)
    return ""


def _state(process: Process) -> dict[str, Any]:
    """What one process is doing, as plain values."""
    pid = process.pid
    return {
        "pid": pid,
        "parent": process.parent,
        "session": process.session,
        "name": process.name,
        "command": _text(f"/proc/{pid}/cmdline").replace("\0", " ").strip(),
        "state": process.state,
        "wchan": _text(f"/proc/{pid}/wchan"),
        "threads": process.threads,
        "thread_wchans": _thread_wchans(pid),
        "rss_bytes": process.rss_bytes,
    }


def _thread_wchans(pid: int) -> dict[str, int]:
    """How many threads wait in which kernel function ("0": running, or not ours to see)."""
    with contextlib.suppress(OSError):
        threads = os.listdir(f"/proc/{pid}/task")[:MAX_THREADS]
        return dict(Counter(_text(f"/proc/{pid}/task/{thread}/wchan") for thread in threads).most_common())
    return {}


def _cpu_share(process: Process, ticks_before: int) -> float | None:
    """Cores used since the first look: near 0 for a wait, 1 or more for a spin; `None` where it has ended."""
    now = processes.read(process.pid)
    if now is None or now.key != process.key:
        return None
    return round((now.cpu_ticks - ticks_before) / processes.TICKS_PER_S / STACKS_WAIT_S, 3)


def _last_events(job_dir: str) -> dict[str, dict[str, float]]:
    """Size and age of each rank's event file: the rank that stopped first is the suspect."""
    found = {}
    for rank, path in events.files(job_dir).items():
        with contextlib.suppress(OSError):
            status = os.stat(path)
            found[str(rank)] = {"size_bytes": status.st_size, "age_s": round(time.time() - status.st_mtime, 3)}
    return found


def _names(job_dir: str, pattern: str) -> list[str]:
    paths = glob.glob(os.path.join(glob.escape(job_dir), pattern))
    return sorted(os.path.relpath(path, job_dir) for path in paths if os.path.isfile(path))


def _ask_recorders(job_dir: str) -> list[str]:
    """Write to each rank's Flight Recorder pipe, which makes it dump (TORCH_NCCL_DEBUG_INFO_PIPE_FILE); their names."""
    asked = []
    for path in sorted(glob.glob(os.path.join(glob.escape(job_dir), "*.pipe"))):
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(os.lstat(path).st_mode):
                pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
                with open(pipe, "wb") as file:
                    file.write(b"1\n")
                asked.append(os.path.basename(path))
    return asked


def _device_state(job_dir: str) -> str | None:
    """Name of the file with what `nvidia-smi -q` says; `None` where there is no such tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    name = "nvidia-smi.txt"
    with contextlib.suppress(OSError), open(os.path.join(job_dir, name), "wb") as file:
        look = subprocess.Popen([tool, "-q"], stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        with contextlib.suppress(subprocess.TimeoutExpired):
            look.wait(DEVICE_TOOL_S)
        look.kill()  # never waited for: where the driver hangs, it hangs too, and ends with the tree
    return name
