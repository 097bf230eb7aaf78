"""Runs one drill: makes what its fault needs around the program, runs it, and keeps what it says in `seen/`.

`python -m harness.payload.drills.stage job.json`, in the job directory. Standard library only. Nothing outside the job
directory is written: file systems are mounted in a namespace of the program's own, which goes when it ends.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.payload.drills.deed import UNDONE

SEEN = Path("seen")
CONSOLE = SEEN / "console.log"
POLL_S = 0.1
HOLDER_LIMIT_S = 90.0
LIBRARIES = {"vllm": "vLLM", "triton": "Triton"}
OWN_FILES = ("events.rank*.jsonl", "nccl_trace_rank_*", "nccl.*.log", "server.log", "prepare.log")
"""What a job of ours leaves in its directory and a person would look at."""


def main(argv: list[str]) -> int:
    """Run the order of `job.json`; the program's exit code, 124 where it had to be ended at its limit."""
    order = json.loads(Path(argv[0]).read_text(encoding="utf-8"))["drill"]
    if reason := lacking(order):
        return _say(skipped=reason)
    SEEN.mkdir(exist_ok=True)
    began = time.monotonic()
    try:
        with prepared(order) as (prefix, arguments, env), scratch() as folders:
            env = {**os.environ, **folders, **_one_gpu(order), **order["env"], **env}
            code = _run([*prefix, *_command(order, arguments)], env, order)
    except NotPrepared as problem:
        return _say(skipped=str(problem))
    _gather()
    undone = {"undone": UNDONE.read_text(encoding="utf-8")} if UNDONE.exists() else {}
    return _say(**undone, exit_code=code, seconds=round(time.monotonic() - began, 1), host=socket.gethostname())


class NotPrepared(Exception):
    """What a fault needs around its program could not be made."""


@contextlib.contextmanager
def scratch() -> Iterator[dict[str, str]]:
    """Variables that send what libraries leave behind into a folder which goes with the program.

    It is not in the job directory, whose name may be too long for the address of a socket.
    """
    with tempfile.TemporaryDirectory(prefix="drill-", ignore_cleanup_errors=True) as folder:
        yield dict.fromkeys(("TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_CACHE_DIR"), folder)


def _one_gpu(order: dict[str, Any]) -> dict[str, str]:
    """A program without a launcher sees one GPU alone: Trainer would spread itself over more."""
    if order["ranks"] or order["env"].get("DRILL_DEVICE") != "cuda":
        return {}
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def _say(**ended: Any) -> int:
    """How it went, for whoever reads the job directory."""
    Path("ended.json").write_text(json.dumps(ended) + "\n", encoding="utf-8")
    return 0


def lacking(order: dict[str, Any]) -> str:
    """What this machine lacks for the fault; empty where nothing is known to be missing."""
    needs = order["needs"]
    if "mounts" in needs and not namespace():
        return "this host lets no program mount a file system of its own (root, or user namespaces, are needed)"
    for name, library in LIBRARIES.items():
        if name in needs and importlib.util.find_spec(name) is None:
            return f"{library} is not installed in this environment"
    return ""


def _command(order: dict[str, Any], arguments: list[str]) -> list[str]:
    """The program alone, under torchrun, or the command line of a job."""
    if order["argv"]:
        return [sys.executable, *order["argv"]]
    program = ["-m", "harness.payload.drills", order["program"]]
    if not order["ranks"]:
        return [sys.executable, *program]
    logs = ["--log-dir", str(SEEN / "ranks"), "--tee", "3"] if order["debug"] else []
    meet = arguments or order["torchrun"] or ["--standalone"]
    return [sys.executable, "-m", "torch.distributed.run", *meet, f"--nproc-per-node={order['ranks']}", *logs, *program]


def _run(command: list[str], env: dict[str, str], order: dict[str, Any]) -> int:
    deadline = time.monotonic() + order["limit_s"]
    with CONSOLE.open("wb") as console:
        process = subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
        waiting = order["signal"]
        while process.poll() is None and time.monotonic() < deadline:
            if waiting and waiting["after"].encode() in CONSOLE.read_bytes():
                process.send_signal(getattr(signal, f"SIG{waiting['name']}"))
                waiting = None
            time.sleep(POLL_S)
    if process.poll() is None:
        process.kill()  # its descendants are ended by whoever started us
        process.wait()
        return 124
    return process.returncode


def _gather() -> None:
    """Put what a job of ours wrote beside what the console showed."""
    for pattern in OWN_FILES:
        for path in Path().glob(pattern):
            shutil.move(path, SEEN / path.name)
    if Path("logs").is_dir():
        shutil.move("logs", SEEN / "logs")


# ---------------------------------------------------------------- what a fault needs around the program


@contextlib.contextmanager
def prepared(order: dict[str, Any]) -> Iterator[tuple[list[str], list[str], dict[str, str]]]:
    """The command's prefix, torchrun's arguments and variables, for as long as what they need is there."""
    with contextlib.ExitStack() as stack:
        need = order["prepare"]
        if need == "port":
            port = _taken_port(stack)
            yield [], ["--nnodes=1", "--master-addr=127.0.0.1", f"--master-port={port}"], {"DRILL_PORT": str(port)}
        elif need == "absent-node":
            yield [], _half_of_two_nodes(), {}
        elif need == "holder":
            _hold_gpu(stack, order)
            yield [], [], {}
        elif need in MOUNTS:
            folder, options = MOUNTS[need]
            Path(folder).mkdir(exist_ok=True)
            yield [*namespace(), "sh", "-c", f'mount -t tmpfs -o {options} drill "{folder}" && exec "$@"', "sh"], [], {}
        else:
            yield [], [], {}


MOUNTS = {
    "full-disk": ("out", "size=512k"),
    "full-artifacts": ("artifacts", "size=512k"),
    "read-only": ("out", "ro"),
    "small-shm": ("/dev/shm", "size=256k"),
}
"""Folder and options of a small file system that only the program sees."""


def namespace() -> list[str]:
    """The command that gives a program mounts of its own; empty where this host allows none."""
    for flags in (["--mount"], ["--map-root-user", "--mount"]):
        command = ["unshare", *flags]
        probe = [*command, "sh", "-c", "mount -t tmpfs drill /dev/shm"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run(probe, capture_output=True, timeout=20, check=False).returncode == 0:
                return command
    return []


def _taken_port(stack: contextlib.ExitStack) -> int:
    listener = stack.enter_context(socket.socket())
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return int(listener.getsockname()[1])


def _half_of_two_nodes() -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=drill",
            "--rdzv-conf=timeout=5,join_timeout=5,last_call_timeout=1,read_timeout=5"]  # fmt: skip


def _hold_gpu(stack: contextlib.ExitStack, order: dict[str, Any]) -> None:
    """Another process takes most of the GPU's free memory, until the program has ended."""
    command = [sys.executable, "-m", "harness.payload.drills", "gpu.hold"]
    holder = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                  stderr=subprocess.DEVNULL))  # fmt: skip
    stack.callback(holder.kill)
    assert holder.stdout is not None
    os.set_blocking(holder.stdout.fileno(), False)
    deadline = time.monotonic() + HOLDER_LIMIT_S
    while not holder.stdout.read():
        if holder.poll() is not None or time.monotonic() > deadline:
            raise NotPrepared("the process that should hold the GPU's memory did not get it")
        time.sleep(POLL_S)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.exit(status)
