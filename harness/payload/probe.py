"""Probes the communication between ranks: join -> proof -> known sums -> who comes late -> all-reduces of each size.

Started once per rank in the job directory, with the path of job.json. It builds no model and takes under a minute; any
exception ends it with an `error` event and exit code 1.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import signal
import sys
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness.events import EventLog
from harness.payload import interfaces
from harness.payload.journal import Journal, host_name

WARMUP = 5
SLOW_S = 1.0
"""An all-reduce that takes this long is warmed up by the first one alone."""
SIZE_BUDGET_S = 5.0
"""Timed all-reduces of one size are cut short after about this, so that a slow network ends too; 3 are always made."""
LEAST = 3
ROUNDS = 20
"""Rounds of work and an all-reduce that show who comes late."""
ARRIVAL_BYTES = 2**20
CHECK_BYTES = 2**20
TIMEOUT_SHARE = 0.7
"""Of the stall limit: a collective that does not end says so, with its Flight Recorder, before the job is ended."""
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_P2P_DISABLE", "NCCL_DEBUG", "NCCL_DEBUG_SUBSYS",
             "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_DISTRIBUTED_DEBUG", "TORCH_CPP_LOG_LEVEL")  # fmt: skip


def main(argv: list[str]) -> int:
    """Run job.json; 0, or 1 after an `error` event."""
    rank = int(os.environ.get("RANK", "0"))
    stacks = open(f"stacks.rank{rank}.txt", "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    journal = Journal(EventLog(".", rank), rank)
    journal.write("alive", what="payload started, importing its libraries")
    # Threads that spin while they wait make a busy host 10 times slower (seen, 2 cores); before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        run(json.loads(Path(argv[0]).read_text(encoding="utf-8"))["case"], journal)
    except Exception as error:
        journal.error(error)
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    journal.write("end", ok=True)
    return 0


def run(case: dict[str, Any], journal: Journal) -> None:
    """All phases of a probe; see the module's first line for their order."""
    import torch

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    with journal.during("join"):
        device = join(case, journal, world_size)
        journal.write("proof", **proof(case, device, world_size))
    with journal.during("check"):
        check(device, world_size, journal)
    with journal.during("arrive"):
        arrive(min(case["iterations"], ROUNDS), device, journal)
    with journal.during("measure"):
        for size_bytes in case["sizes_bytes"]:
            measure(size_bytes, case["iterations"], device, world_size, journal)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- joining


def join(case: dict[str, Any], journal: Journal, world_size: int) -> str:
    """Say who this rank is, then meet the others; the rank's device."""
    import torch

    local_rank, device = int(os.environ.get("LOCAL_RANK", "0")), "cpu"
    if case["device"] == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    journal.write("start", rank=journal.rank, world_size=world_size, local_rank=local_rank, pid=os.getpid(),
                  host=host_name(), python=platform.python_version(),
                  libraries={"torch": torch.__version__}, device=describe(device))  # fmt: skip
    backend = "gloo" if device == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_SHARE * case["stall_s"]),
                                         device_id=None if device == "cpu" else torch.device(device))  # fmt: skip
    torch.distributed.barrier()
    return device


def describe(device: str) -> dict[str, Any]:
    """Type, name and memory of the device."""
    from harness.payload.train import describe_device

    return describe_device(device)


def proof(case: dict[str, Any], device: str, world_size: int) -> dict[str, Any]:
    """The fields of a `proof` event: what this process has in use, and how it differs from the case."""
    import torch

    found: dict[str, Any] = {
        "backend": torch.distributed.get_backend(),
        "world_size": torch.distributed.get_world_size(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "debug_level": torch.distributed.get_debug_level().name,
        "interfaces": interfaces.used(),
    }
    if device != "cpu":
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["peer_access"] = [torch.cuda.can_device_access_peer(torch.cuda.current_device(), other)
                                for other in range(torch.cuda.device_count())
                                if other != torch.cuda.current_device()]  # fmt: skip
    return {**found, "mismatches": mismatches(found, case, world_size)}


def mismatches(found: dict[str, Any], case: dict[str, Any], world_size: int) -> list[str]:
    """One sentence for each way in which what is set up is not what was asked; NCCL's own log tells the rest."""
    asked_backend = "gloo" if case["device"] == "cpu" else "nccl"
    said = []
    if found["backend"] != asked_backend:
        said.append(f"{asked_backend} was asked for, {found['backend']} is used")
    if not found["world_size"] == world_size == case["devices"]:
        said.append(f"{case['devices']} ranks were asked for, {found['world_size']} have met")
    if case["interface"] and asked_backend == "gloo" and case["interface"] not in found["interfaces"]:
        said.append(f"ranks were to talk over {case['interface']}, and talk over {', '.join(found['interfaces'])}")
    off = found["environment"].get("NCCL_P2P_DISABLE", "0") != "0"
    if case["device"] == "cuda" and off == case["p2p"]:
        said.append(f"P2P was to be {'allowed' if case['p2p'] else 'off'}, and NCCL_P2P_DISABLE is {int(off)}")
    if case["debug"] and found["debug_level"] == "OFF":
        said.append("the libraries were to say all they do, and TORCH_DISTRIBUTED_DEBUG is off")
    return said


# ---------------------------------------------------------------- known results


def check(device: str, world_size: int, journal: Journal) -> None:
    """Collectives whose results are known, compared element by element; a wrong one is stated, and is no exception."""
    import torch

    ramp = torch.arange(CHECK_BYTES // 4, device=device, dtype=torch.float32).remainder_(7)
    summed = ramp + (journal.rank + 1)
    torch.distributed.all_reduce(summed)
    compare("all_reduce_sum", summed, world_size * ramp + world_size * (world_size + 1) / 2, journal)
    for root in sorted({0, world_size - 1}):
        sent = ramp + root if journal.rank == root else torch.full_like(ramp, -1.0)
        torch.distributed.broadcast(sent, src=root)
        compare(f"broadcast_from_{root}", sent, ramp + root, journal)
    torch.distributed.barrier()


def compare(name: str, found: Any, expected: Any, journal: Journal) -> None:
    """State whether two tensors are equal, and where not, the element that is furthest off."""
    worst = int((found - expected).abs().nan_to_num(nan=float("inf")).argmax())
    one, other = float(found[worst]), float(expected[worst])
    journal.write("check", name=name, ok=one == other, found=one, expected=other)


# ---------------------------------------------------------------- who comes late


def arrive(rounds: int, device: str, journal: Journal) -> None:
    """Rounds of a fixed piece of work between a barrier and an all-reduce; a slow rank works longer and waits less."""
    import torch

    factor = torch.full((256, 256) if device == "cpu" else (4096, 4096), 1e-3, device=device)
    data = torch.zeros(ARRIVAL_BYTES // 4, device=device)
    work_s, wait_s = [], []
    for _ in range(rounds + WARMUP):
        torch.distributed.barrier()
        settle(device)
        began = time.perf_counter()
        for _ in range(8):
            factor @ factor
        settle(device)
        arrived = time.perf_counter()
        torch.distributed.all_reduce(data)
        settle(device)
        work_s.append(arrived - began)
        wait_s.append(time.perf_counter() - arrived)
    journal.write("arrival", warmup=WARMUP, work_s=work_s[WARMUP:], wait_s=wait_s[WARMUP:])


def settle(device: str) -> None:
    """Wait for all that was given to the GPU."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


# ---------------------------------------------------------------- speed


def measure(size_bytes: int, iterations: int, device: str, world_size: int, journal: Journal) -> None:
    """Time all-reduces of one size, the first warm-up one checked; ends early where the network is slow."""
    import torch

    data = torch.full((size_bytes // 4,), float(journal.rank + 1), device=device)
    first = timed(data, 1, device)[0]
    compare(f"all_reduce_sum_{size_bytes}", data, torch.full_like(data, world_size * (world_size + 1) / 2), journal)
    data.zero_()  # sums of sums would leave the range of a float
    warmup = 1 if agreed(first, device) > SLOW_S else WARMUP
    pace = timed(data, warmup - 1, device)[-1] if warmup > 1 else first
    count = max(LEAST, min(iterations, int(SIZE_BUDGET_S / max(agreed(pace, device), 1e-9))))
    if count < iterations and journal.rank == 0:
        journal.write("note", text=f"{size_bytes} bytes: {count} of {iterations} all-reduces, each taking {pace:.2g} s")
    journal.write("collective", operation="all_reduce", size_bytes=size_bytes, warmup=warmup,
                  timer="host clock" if device == "cpu" else "cuda events",
                  time_s=timed(data, count, device))  # fmt: skip


def agreed(duration_s: float, device: str) -> float:
    """The longest of all ranks' durations: they must take the same way."""
    import torch

    longest = torch.tensor([duration_s], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
    return float(longest)


def timed(data: Any, count: int, device: str) -> list[float]:
    """Seconds of each of `count` all-reduces, one right after the other; on a GPU as its own events say."""
    import torch

    if device == "cpu":
        return [timed_on_host(data) for _ in range(count)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.distributed.barrier()
    events[0].record()
    for event in events[1:]:
        torch.distributed.all_reduce(data)
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def timed_on_host(data: Any) -> float:
    """Seconds of one all-reduce."""
    import torch

    began = time.perf_counter()
    torch.distributed.all_reduce(data)
    return time.perf_counter() - began


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: libraries' exit handlers may wait for ranks that are gone.
    os._exit(status)
