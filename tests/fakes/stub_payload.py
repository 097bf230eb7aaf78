"""A payload that behaves like a real one towards its supervisor, and misbehaves on request. Standard library + events.

A launcher starts each rank in a session of its own, as torchrun does; each rank appends to `events.rank<N>.jsonl`. The
key `stub` of `job.json` changes the defaults below.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from typing import Any

from harness import events

DEFAULTS: dict[str, Any] = {
    "ranks": 2,
    "steps": 4,
    "step_s": 0.02,
    "exit_code": 0,  # of the launcher, after all ranks ended well
    "own_sessions": True,
    "ignore_sigterm": False,  # launcher and ranks
    "hang_at_step": None,  # rank 0 waits there for good, and so do the others
    "crash_at_step": None,  # rank 0 raises
    "kill_at_step": None,  # rank 0 gets a SIGKILL, as from the kernel
    "stacks": True,  # write Python stacks on SIGUSR1
    "allocate_bytes": 0,
    "server": False,  # rank 0 starts a server-like child in a session of its own
    "shared_memory": None,  # the server-like child makes and maps /dev/shm/<this>_<pid>, and leaves it behind
    "left_behind": 0,  # daemons that outlive the launcher
}


def options() -> dict[str, Any]:
    with open("job.json") as file:
        return DEFAULTS | json.load(file).get("stub", {})


def spawn(role: str, number: int, own_session: bool) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", __file__, role, str(number)], start_new_session=own_session)


def launcher(stub: dict[str, Any]) -> int:
    """Start the ranks and wait for them; the first failure ends the others."""
    ranks = [spawn("rank", number, stub["own_sessions"]) for number in range(stub["ranks"])]
    for number in range(stub["left_behind"]):
        spawn("daemon", number, True)
    if not stub["ignore_sigterm"]:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_end(ranks)))
    while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
        time.sleep(0.01)
    return _end(ranks) if any(rank.returncode for rank in ranks) else int(stub["exit_code"])


def _end(ranks: list[subprocess.Popen[bytes]]) -> int:
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        if rank.wait() == -signal.SIGKILL:
            print(
                "Root Cause: exitcode  : -9, Signal 9 (SIGKILL) received by PID", rank.pid, file=sys.stderr, flush=True
            )
    return 1


def rank(stub: dict[str, Any], number: int) -> int:
    log = events.EventLog(".", number)
    if stub["stacks"]:
        faulthandler.register(signal.SIGUSR1, file=open(f"stacks.rank{number}.txt", "w"), all_threads=True)  # noqa: SIM115
    held = b""
    server = spawn("server", 0, True) if stub["server"] and number == 0 else None
    log.write("start", rank=number, world_size=stub["ranks"], pid=os.getpid())
    for step in range(1, stub["steps"] + 1):
        misbehave(stub, number, step)
        started = time.time()
        time.sleep(stub["step_s"])
        held = held or b"x" * stub["allocate_bytes"]
        log.write("step", step=step, start=started, step_time_s=time.time() - started, tokens=64, loss=2.0 / step)
    if server:
        server.terminate()
        server.wait()
    log.write("end", ok=True, held_bytes=len(held))
    return 0


def misbehave(stub: dict[str, Any], number: int, step: int) -> None:
    if stub["hang_at_step"] is not None and step >= stub["hang_at_step"]:
        wait_for_the_others()
    if number == 0 and step == stub["crash_at_step"]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if number == 0 and step == stub["kill_at_step"]:
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for_the_others() -> None:
    """A name to find in the saved stacks."""
    while True:
        time.sleep(60)


def server(stub: dict[str, Any]) -> int:
    """Like vLLM's workers: shared memory mapped, and after a while an environment that nobody can read any more."""
    if stub["shared_memory"]:
        with open(f"/dev/shm/{stub['shared_memory']}_{os.getpid()}", "w+b") as file:
            file.truncate(4096)
            segment = mmap.mmap(file.fileno(), 4096)
            segment[:2] = b"in"
    time.sleep(1.0)
    overwrite_environment()
    time.sleep(3600)
    return 0


def overwrite_environment() -> None:
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])  # env_start and env_end, fields 50 and 51
    ctypes.memset(start, 0, end - start)


def main() -> int:
    role, number = sys.argv[1], int(sys.argv[2])
    stub = options()
    if stub["ignore_sigterm"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if role == "daemon":
        time.sleep(3600)
    if role == "server":
        return server(stub)
    return rank(stub, number) if role == "rank" else launcher(stub)


if __name__ == "__main__":
    sys.exit(main())
