"""A vLLM OpenAI server: its command line as a pure function, start, wait until ready, stop."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.payload import client, processes, serverlog
from harness.payload.parsers import Parsers

HOST = "127.0.0.1"
LOWEST_PORT = 15000
LOG_NAME = "server.log"
BASE_NAME = "model"
ADAPTER_NAME = "adapter"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` accepts: `MaxLoRARanks` in vllm/config/lora.py."""
CPU_KV_CACHE_GIB = "1"
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Served:
    """What a server loads."""

    model: str
    """A directory, or a checkpoint's name in the local cache."""
    revision: str | None = None
    dummy: bool = False
    """The server makes up the weights."""
    adapter: str | None = None
    adapter_rank: int = 0

    @property
    def name(self) -> str:
        """The model name of the requests that are measured."""
        return ADAPTER_NAME if self.adapter else BASE_NAME


class ServerDied(Exception):
    """The server's process ended by itself."""


@dataclass
class Server:
    """A started server."""

    process: subprocess.Popen[bytes]
    port: int
    started_at: float
    memory: processes.PeakMemory
    log: Path = field(default_factory=lambda: Path(LOG_NAME))

    @property
    def base_url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    def check(self) -> None:
        """Raises `ServerDied` with the first exception of its log where the process has ended."""
        if (code := self.process.poll()) is not None:
            ended = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
            cause = serverlog.first_error(self.log_text())
            raise ServerDied(f"the vLLM server ended with {ended}" + (f": {cause}" if cause else ""))

    def log_text(self) -> str:
        """All that it wrote so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now, outside the range that outgoing connections take.

    vLLM binds it only seconds later, and a load generator beside us opens connections by the hundred.
    """
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    for port in random.SystemRandom().sample(range(LOWEST_PORT, max(first_outgoing, LOWEST_PORT + 100)), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise OSError(f"none of 100 ports of {HOST} from {LOWEST_PORT} on is free")


def argv(
    python: str, case: dict[str, Any], variant: dict[str, Any], served: Served, parsers: Parsers, port: int
) -> list[str]:
    """The server's command line."""
    cache_dtype = case["mamba_ssm_cache_dtype"] or variant["serving"].get("mamba_ssm_cache_dtype")
    command = [
        python, "-m", "vllm.entrypoints.cli.main", "serve", served.model,
        "--host", HOST, "--port", str(port), "--served-model-name", BASE_NAME,
        "--dtype", DTYPES[case["param_dtype"]], "--seed", str(case["seed"]),
        "--max-model-len", str(case["max_model_len"]), "--max-num-seqs", str(case["max_num_seqs"]),
        "--tensor-parallel-size", str(case["tensor_parallel"]),
    ]  # fmt: skip
    command += ["--revision", served.revision] if served.revision else []
    command += ["--load-format", "dummy"] if served.dummy else []
    command += ["--enforce-eager"] if case["enforce_eager"] else []
    if case["cudagraph_max"] is not None:
        command += ["--max-cudagraph-capture-size", str(case["cudagraph_max"])]
    command += ["--mamba-ssm-cache-dtype", cache_dtype] if cache_dtype else []
    if case["device"] == "cuda":  # on a CPU that share would be of the host's memory
        command += ["--gpu-memory-utilization", str(case["gpu_memory_utilization"])]
    else:
        # With it a long prefill needs the Mamba states at block ends, which vLLM 0.32's CPU kernel does not return:
        # the engine dies of an IndexError (mamba_mixer2.py, `varlen_states[last_chunk_indices_p]`).
        command += ["--no-enable-prefix-caching"]
    return command + _lora(served) + _chat(case, variant, parsers)


def _lora(served: Served) -> list[str]:
    if served.adapter is None:
        return []
    rank = next((size for size in LORA_RANKS if size >= served.adapter_rank), served.adapter_rank)
    modules = ["--lora-modules", f"{ADAPTER_NAME}={served.adapter}"]
    return ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank), *modules]


def _chat(case: dict[str, Any], variant: dict[str, Any], parsers: Parsers) -> list[str]:
    """Thinking policy where it is a template argument, and the parsers."""
    flags = []
    if variant["serving"].get("thinking") == "template_kwarg":
        flags += ["--default-chat-template-kwargs", json.dumps({"enable_thinking": case["thinking"]})]
    if parsers.reasoning:
        flags += ["--reasoning-parser", parsers.reasoning]
        flags += ["--reasoning-parser-plugin", parsers.reasoning_plugin] if parsers.reasoning_plugin else []
    if parsers.tool:
        flags += ["--enable-auto-tool-choice", "--tool-call-parser", parsers.tool]
        flags += ["--tool-parser-plugin", parsers.tool_plugin] if parsers.tool_plugin else []
    return flags


def environment(device: str, job_dir: Path) -> dict[str, str]:
    """The environment of every child: this one's, no telemetry, no proxy to ourselves, `vllm` known by its name."""
    found = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    found["NO_PROXY"] = found["no_proxy"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), HOST, "localhost"]))
    if device == "cpu":
        found.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KV_CACHE_GIB)
    if shim := _shim(job_dir):
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(shim), os.environ.get("PYTHONPATH")]))
    return found


def _shim(job_dir: Path) -> Path | None:
    """A folder that names the CPU build, installed as `vllm-cpu`, `vllm` too: vLLM looks its own version up by that."""
    versions = library_versions(("vllm", "vllm-cpu"))
    if "vllm" in versions or "vllm-cpu" not in versions:
        return None
    version = f"{versions['vllm-cpu'].split('+')[0]}+cpu"
    folder = job_dir / "shim" / f"vllm-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
    return folder.parent


def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those that are installed, without importing any."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def start(command: list[str], env: dict[str, str], port: int) -> Server:
    """Start it in a session of its own; its output goes to the log file."""
    with open(LOG_NAME, "ab") as log:
        started_at = time.monotonic()
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Server(process, port, started_at, processes.PeakMemory(process.pid))


def wait_ready(server: Server, alive: Callable[[], None]) -> float:
    """Seconds from the start until `/health` answers; calls `alive` often, raises `ServerDied`."""
    while True:
        server.check()
        if client.alive(server.base_url):
            return time.monotonic() - server.started_at
        alive()
        time.sleep(0.25)


@dataclass(frozen=True)
class Stopped:
    """How a server ended."""

    duration_s: float
    killed: list[int]
    """Processes that SIGTERM did not end in time."""
    shared_memory_removed: list[str]


def stop(server: Server, grace_s: float) -> Stopped:
    """End its whole session, remove the shared memory it left; RuntimeError where a process stays."""
    began = time.monotonic()
    session = server.process.pid
    segments = server.memory.segments | processes.shared_memory(processes.in_session(session))
    server.memory.stop()
    killed = processes.end(session, grace_s)
    server.process.wait(timeout=10)
    return Stopped(time.monotonic() - began, killed, processes.remove_shared(segments))
