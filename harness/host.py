"""Facts of this host that stand in every record: processor, memory, GPUs, and the commit of the harness."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from harness.schema import Gpu


def cpu_name() -> str:
    """The processor's model name."""
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """Memory of the host, or of the cgroup where that is smaller."""
    total = int(psutil.virtual_memory().total)
    limit = "".join(_lines(Path("/sys/fs/cgroup/memory.max"))).strip()
    return min(total, int(limit)) if limit.isdigit() else total


def interfaces() -> tuple[str, ...]:
    """Network interfaces that are up and have an address, loopback left out, by name."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    inet = (socket.AF_INET, socket.AF_INET6)
    addressed = {name for name, found in psutil.net_if_addrs().items() if any(one.family in inet for one in found)}
    return tuple(sorted(name for name in up & addressed if name != "lo"))


NETWORKED = frozenset({"nfs", "nfs4", "lustre", "gpfs", "beegfs", "wekafs", "panfs", "pvfs2", "orangefs", "ceph",
                       "cifs", "smb3", "afs", "9p", "virtiofs", "vboxsf"})  # fmt: skip
"""File systems of other hosts, by the kernel's names; beside them all that FUSE serves, `fuse.*`."""


def apart(folder: Path, other: Path) -> str | None:
    """Why `folder` is no local disk apart from the file system of `other`, in a sentence; `None` where it is one."""
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} is no folder that can be written to"
    if folder.stat().st_dev == other.stat().st_dev:
        return f"{folder} lies on the run directory's own file system"
    kind = file_system(folder)
    if kind in NETWORKED or kind.startswith("fuse."):
        return f"{folder} lies on {kind}, which is no disk of this host"
    return None


def file_system(folder: Path) -> str:
    """The kernel's name for the type of the file system that `folder` lies on; empty where none is known."""
    path = folder.resolve()
    mounts = [one for one in psutil.disk_partitions(all=True) if path.is_relative_to(one.mountpoint)]
    return max(mounts, key=lambda one: len(one.mountpoint)).fstype if mounts else ""


def gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """The GPUs that this process may use, in the driver's order, and the driver's version; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return (), None
    try:
        found = tuple(_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
        return visible(found, os.environ.get("CUDA_VISIBLE_DEVICES")), _text(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def visible(found: tuple[Gpu, ...], setting: str | None) -> tuple[Gpu, ...]:
    """Those of `found` that CUDA_VISIBLE_DEVICES allows, by index or UUID: on a shared host the others are not ours."""
    if setting is None:
        return found
    names = [name.strip() for name in setting.split(",") if name.strip()]
    return tuple(gpu for gpu in found if any(name == str(gpu.index) or _is_uuid(gpu, name) for name in names))


def _is_uuid(gpu: Gpu, name: str) -> bool:
    return name.startswith("GPU-") and gpu.uuid.startswith(name)


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    return Gpu(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        total_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
    )


def of_nodes(job_dirs: Sequence[Path]) -> dict[str, Any]:
    """Fields of `Provenance` as a cluster's nodes said them in `node.<name>.txt` of these jobs; empty where none did.

    Processor, memory and cores are those of the first node; hosts and GPUs those of all.
    """
    found = [_node(path) for folder in job_dirs for path in sorted(folder.glob("node.*.txt"))]
    nodes = {node["name"]: node for node in found if node["name"]}
    if not nodes:
        return {}
    first = next(iter(nodes.values()))
    gpus = tuple(gpu for node in nodes.values() for gpu in node["gpus"])
    same = {"cpu": first["cpu"], "cpu_count": first["cpus"], "memory_bytes": first["memory_bytes"]}
    return {**same, "hosts": tuple(nodes), "gpus": gpus, "driver": first["driver"]}


def _node(path: Path) -> dict[str, Any]:
    """What one node said; a line that does not read counts for nothing."""
    found: dict[str, Any] = {"name": "", "cpus": 0, "memory_bytes": 0, "cpu": "", "gpus": [], "driver": None}
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == "gpu" and len(cells := [cell.strip() for cell in value.split(",")]) == 5 and cells[3].isdigit():
            total = int(cells[3]) * 1024**2
            found["gpus"].append(Gpu(index=int(cells[0]), name=cells[1], uuid=cells[2], total_bytes=total))
            found["driver"] = cells[4]
        elif key in ("cpus", "memory_kib") and value.isdigit():
            found |= {"cpus": int(value)} if key == "cpus" else {"memory_bytes": int(value) * 1024}
        elif key in ("node", "cpu"):
            found["name" if key == "node" else "cpu"] = value
    return found


def commit(root: Path) -> str | None:
    """The git commit of the tree at `root`, with `+dirty` where it differs.

    Outside a checkout what `HARNESS_COMMIT` says, for a copy that was carried to a host; `None` without it.
    """
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return os.environ.get("HARNESS_COMMIT")
    return head + ("+dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
