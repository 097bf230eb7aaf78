"""Look at this machine: each function asks one thing and returns facts. Nothing is judged or changed here."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

from harness.doctor.facts import (
    Disk,
    Docker,
    Engines,
    GpuFleet,
    GpuState,
    Holder,
    Host,
    Interface,
    Limit,
    Network,
    Slurm,
)

COMMAND_TIMEOUT_S = 3
MEMORY_UNKNOWN = 1 << 63
"""NVML gives all ones where it cannot tell the memory of a process."""
SLOWED_BY = {0x08: "hardware slowdown", 0x40: "temperature", 0x80: "power brake"}
"""Bits of NVML's clocks event reasons that mean trouble: nvmlClocksEventReasonHw* in nvml.h."""

T = TypeVar("T")


def gpus(runs: Path) -> GpuFleet:
    """The GPUs as the driver's library names them; no driver is a fact, not an error."""
    import pynvml

    fleet = GpuFleet(
        kernel_driver=kernel_driver(_text("/proc/driver/nvidia/version")),
        device_nodes=any(Path("/dev").glob("nvidia[0-9]*")),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        order=os.environ.get("CUDA_DEVICE_ORDER"),
    )
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return fleet.model_copy(update={"problem": str(error)})
    try:
        return fleet.model_copy(update=_ask_driver(pynvml, runs))
    except pynvml.NVMLError as error:
        return fleet.model_copy(update={"problem": str(error)})
    finally:
        pynvml.nvmlShutdown()


def _ask_driver(nvml: Any, runs: Path) -> dict[str, Any]:
    """The fields of `GpuFleet` that only a driver that answers can fill."""
    cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
    return {
        "gpus": tuple(_gpu(nvml, index, runs) for index in range(nvml.nvmlDeviceGetCount())),
        "driver": _str(nvml.nvmlSystemGetDriverVersion()),
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
    }


def kernel_driver(text: str) -> str | None:
    """The version in /proc/driver/nvidia/version: the first word of its first line that looks like 580.65.06."""
    words = text.splitlines()[0].split() if text else []
    return next((word for word in words if word.replace(".", "").isdigit() and "." in word), None)


def _gpu(nvml: Any, index: int, runs: Path) -> GpuState:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(question: str, *arguments: Any) -> Any:
        """The answer, or `None` where this card or driver has none."""
        with contextlib.suppress(nvml.NVMLError):
            return getattr(nvml, question)(handle, *arguments)
        return None

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    rows, mig = ask("nvmlDeviceGetRemappedRows"), ask("nvmlDeviceGetMigMode")
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons") or 0
    ecc = ask("nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    return GpuState(
        index=index,
        name=_str(nvml.nvmlDeviceGetName(handle)),
        uuid=_str(nvml.nvmlDeviceGetUUID(handle)),
        bus_id=_str(nvml.nvmlDeviceGetPciInfo(handle).busId),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        temperature_c=ask("nvmlDeviceGetTemperatureV", nvml.NVML_TEMPERATURE_GPU),
        slowdown_c=ask("nvmlDeviceGetTemperatureThreshold", nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
        slowed_by=tuple(what for bit, what in SLOWED_BY.items() if reasons & bit),
        ecc_uncorrected=ecc,
        remap_pending=bool(rows[2]) if rows else None,
        remap_failed=bool(rows[3]) if rows else None,
        mig=bool(mig[0]) if mig else None,
        holders=tuple(_holder(process, runs) for process in ask("nvmlDeviceGetComputeRunningProcesses") or ()),
    )


def _holder(process: Any, runs: Path) -> Holder:
    used = process.usedGpuMemory
    known = used if used is not None and used < MEMORY_UNKNOWN else None
    try:
        seen = psutil.Process(process.pid)
        run = run_of(Path(_or(seen.cwd, "/")), runs)
        return Holder(pid=process.pid, name=seen.name(), user=_or(seen.username, None), memory_bytes=known, run=run)
    except psutil.Error:
        return Holder(pid=process.pid, name=None, user=None, memory_bytes=known)


def _or(ask: Callable[[], T], default: T) -> T:
    with contextlib.suppress(psutil.Error, KeyError):
        return ask()
    return default


def run_of(folder: Path, runs: Path) -> str | None:
    """The run directory below `runs` that `folder` belongs to, as a path to give to `harness cancel`."""
    runs = runs.resolve()
    below = folder.relative_to(runs).parts if folder.is_relative_to(runs) else ()
    return str(runs / below[0]) if below else None


def host() -> Host:
    """Python, cores, memory, /dev/shm and the limits of this shell."""
    memory = psutil.virtual_memory()
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    total = min(int(memory.total), int(limit)) if limit.isdigit() else int(memory.total)
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    token = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    return Host(
        python=sys.version_info[:3],
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=total,
        available_bytes=min(total, int(memory.available)),
        shm_bytes=shm.total if shm else None,
        shm_free_bytes=shm.free if shm else None,
        memlock=_limit(resource.RLIMIT_MEMLOCK),
        stack=_limit(resource.RLIMIT_STACK),
        nofile=_limit(resource.RLIMIT_NOFILE),
        hf_token=token or (hub_folder() / "token").is_file(),
    )


def _limit(which: int) -> Limit:
    soft, hard = (None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(which))
    return Limit(soft=soft, hard=hard)


def hub_folder() -> Path:
    """Where huggingface_hub keeps weights and a token: HF_HOME, else its default."""
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")


def disk(purpose: str, folder: Path) -> Disk:
    """The free space at `folder`, or at the nearest parent that exists."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return Disk(purpose=purpose, folder=str(folder.absolute()), free_bytes=shutil.disk_usage(place).free)


def network() -> Network:
    """Interfaces that are up, InfiniBand devices, and the module for GPUDirect RDMA."""
    up = {name: stats for name, stats in psutil.net_if_stats().items() if stats.isup and name != "lo"}
    devices = Path("/sys/class/infiniband")
    modules = {line.split(" ")[0] for line in _text("/proc/modules").splitlines()}
    return Network(
        interfaces=tuple(
            Interface(name=name, speed_mbit_per_s=stats.speed or None, virtual=_is_virtual(name))
            for name, stats in sorted(up.items())
        ),
        infiniband=tuple(sorted(entry.name for entry in devices.iterdir())) if devices.is_dir() else (),
        peermem="nvidia_peermem" in modules,
        socket_ifname=os.environ.get("NCCL_SOCKET_IFNAME"),
    )


def _is_virtual(name: str) -> bool:
    """Has the interface no device behind it (bridges, veth pairs, tunnels)?"""
    return not Path("/sys/class/net", name, "device").exists()


def engines() -> Engines:
    """The Docker Engine, and other container commands on PATH."""
    names = ("apptainer", "singularity", "enroot", "podman")
    found = {name: path for name in names if (path := shutil.which(name))}
    return Engines(docker=_docker(), commands=found)


def _docker() -> Docker:
    import docker  # half a second that no other verb should pay

    try:
        client = docker.from_env(timeout=COMMAND_TIMEOUT_S)
        try:
            info = client.info()
        finally:
            client.close()
    except (docker.errors.DockerException, OSError) as error:
        return Docker(version=None, problem=str(error))
    return Docker(
        version=str(info.get("ServerVersion")),
        runtimes=tuple(sorted(info.get("Runtimes") or ())),
        cdi_devices=sum("nvidia.com/gpu" in str(device) for device in info.get("DiscoveredDevices") or ()),
    )


def slurm() -> Slurm:
    """Partitions as sinfo lists them."""
    if not shutil.which("sinfo"):
        return Slurm(installed=False)
    argv = ["sinfo", "--noheader", "--format=%P|%D|%t|%G"]
    try:
        answer = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return Slurm(installed=True, problem=str(said).strip()[-300:])
    rows = [line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 3]
    idle = any(state.startswith("idle") for _, _, state, _ in rows)
    return Slurm(installed=True, partitions=tuple(" ".join(row) for row in rows), idle=idle)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _str(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
