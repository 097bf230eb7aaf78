"""What the facts mean: pure functions from facts to findings, each with what to mend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from harness.catalog import Needs, Variant
from harness.doctor.facts import (
    Disk,
    Docker,
    Engines,
    Finding,
    GpuFleet,
    GpuState,
    Holder,
    Host,
    Interface,
    Limit,
    Network,
    Slurm,
    State,
)

GIB = 1024**3
GB = 10**9

QUICKSTART_CORES = 2
QUICKSTART_MEMORY_BYTES = 7 * GIB
"""The quickstart is made for 2 cores and 8 GB, of which a kernel shows a little less."""
SHM_BYTES = 1 * GIB
"""NVIDIA's NCCL guide, "Shared memory", asks containers for --shm-size=1g; Docker's own 64 MiB ends in bus errors."""
STACK_BYTES = 8 * 1024**2
NOFILE = 4096
"""A server under load has a socket for each request; vLLM warns below 65535 and raises the soft limit to the hard."""
RUNS_BYTES = 2 * GB
"""Room for a quickstart's checkpoints and models; below a tenth of it nothing runs to its end."""
HELD_BYTES = 1 * GIB
"""Memory taken on a GPU beyond the driver's own share (a few hundred MiB)."""
WARM_MARGIN_C = 5
"""Degrees below the card's own slowdown threshold from which it is worth a look."""
CARD_TOLERANCE = 0.95
"""A card marketed with 24 GB shows a few per cent less than 24e9 bytes."""


def _ok(topic: str, text: str) -> Finding:
    return Finding(topic=topic, status="ok", text=text)


def _finding(topic: str, status: State, text: str, mend: str) -> Finding:
    return Finding(topic=topic, status=status, text=text, mend=mend)


def gib(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / GIB:.1f} GiB"


# ---------------------------------------------------------------- GPUs


def gpus(fleet: GpuFleet) -> list[Finding]:
    """The driver, the order of the cards, then each card."""
    if not fleet.gpus:
        return [_no_gpus(fleet)]
    found = [_driver(fleet), _order(fleet)]
    for gpu in fleet.gpus:
        found += [_card(gpu), *_health(gpu), *_holders(gpu)]
    return found


def _no_gpus(fleet: GpuFleet) -> Finding:
    """No card seen: a plain fact, but for a driver that is there and does not answer."""
    if "mismatch" in fleet.problem.lower():
        return _finding(
            "gpus",
            "bad",
            f"The driver's library and its loaded kernel module ({fleet.kernel_driver}) are of two versions.",
            "Reboot, or unload and load the nvidia modules: the driver was upgraded under a running kernel.",
        )
    if fleet.kernel_driver or fleet.device_nodes:
        return _finding(
            "gpus",
            "bad",
            f"An NVIDIA driver is loaded ({fleet.kernel_driver}) and shows no GPU: {fleet.problem or 'it lists none'}.",
            "In a container: start it with its GPUs (docker run --gpus all). On the host: dmesg | grep -i xid",
        )
    return _finding(
        "gpus",
        "absent",
        "No NVIDIA driver here: the tiny variants run on the CPU, the real ones do not run.",
        "On a GPU host: install NVIDIA's driver until nvidia-smi lists every card.",
    )


def _driver(fleet: GpuFleet) -> Finding:
    if fleet.kernel_driver and fleet.driver and fleet.kernel_driver != fleet.driver:
        text = f"The kernel module is {fleet.kernel_driver}, the driver's library {fleet.driver}."
        return _finding("driver", "bad", text, "Reboot, so that both are of the same driver branch.")
    return _ok("driver", f"{len(fleet.gpus)} GPU(s) on driver {fleet.driver}, which runs CUDA up to {fleet.cuda}.")


def _order(fleet: GpuFleet) -> Finding:
    """CUDA's own order is fastest first: with unlike cards, index 0 is then not nvidia-smi's."""
    names = sorted({gpu.name for gpu in fleet.gpus})
    visible = f"; CUDA_VISIBLE_DEVICES={fleet.visible}" if fleet.visible is not None else ""
    if len(names) > 1 and fleet.order != "PCI_BUS_ID":
        return _finding(
            "gpu order",
            "warn",
            f"Unlike cards ({', '.join(names)}): CUDA numbers them by speed, nvidia-smi by bus{visible}.",
            "export CUDA_DEVICE_ORDER=PCI_BUS_ID, and run cases on one kind of card.",
        )
    if fleet.visible == "":
        mend = "unset CUDA_VISIBLE_DEVICES, or name the GPUs that may be used."
        return _finding("gpu order", "warn", "CUDA_VISIBLE_DEVICES is empty: no job will see a GPU.", mend)
    return _ok("gpu order", f"One kind of card, numbered by bus: {', '.join(g.bus_id for g in fleet.gpus)}{visible}.")


def _card(gpu: GpuState) -> Finding:
    heat = f", {gpu.temperature_c} °C" if gpu.temperature_c is not None else ""
    mig = ", MIG on" if gpu.mig else ""
    free = f"{gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free"
    return _ok(f"gpu {gpu.index}", f"{gpu.name} ({gpu.uuid}), {free}{heat}{mig}.")


def _health(gpu: GpuState) -> list[Finding]:
    topic = f"gpu {gpu.index} health"
    found = [_heat(gpu, topic)]
    if gpu.slowed_by:
        mend = "Look at cooling and power (nvidia-smi -q -d PERFORMANCE); speeds measured now are too low."
        found.append(_finding(topic, "warn", f"Its clocks are held down by: {', '.join(gpu.slowed_by)}.", mend))
    if gpu.remap_failed:
        text = "Row remapping failed: the memory has more defects than spare rows."
        found.append(_finding(topic, "bad", text, "Take the card out of service and have it replaced."))
    elif gpu.remap_pending:
        text = "A memory row waits to be remapped."
        found.append(_finding(topic, "warn", text, "Reset the GPU or reboot the host when no job runs."))
    if gpu.ecc_uncorrected:
        text = f"{gpu.ecc_uncorrected} uncorrected memory error(s) since the driver was loaded."
        mend = "Reset the GPU when no job runs; if they come back, run NVIDIA's field diagnostics (dcgmi diag -r 3)."
        found.append(_finding(topic, "warn", text, mend))
    trouble = [finding for finding in found if finding is not None]
    known = gpu.ecc_uncorrected is not None or gpu.remap_pending is not None
    return trouble or ([_ok(topic, "No uncorrected memory error, no row to remap.")] if known else [])


def _heat(gpu: GpuState, topic: str) -> Finding | None:
    if gpu.temperature_c is None or gpu.slowdown_c is None or gpu.temperature_c < gpu.slowdown_c - WARM_MARGIN_C:
        return None
    status: State = "bad" if gpu.temperature_c >= gpu.slowdown_c else "warn"
    text = f"{gpu.temperature_c} °C, and the card slows itself down at {gpu.slowdown_c} °C."
    return _finding(topic, status, text, "Look at fans and airflow before measuring.")


def _holders(gpu: GpuState) -> list[Finding]:
    """Who holds memory: small allocations by others end in out-of-memory errors that look like ours."""
    topic, used = f"gpu {gpu.index} processes", gpu.total_bytes - gpu.free_bytes
    if gpu.holders:
        return [_held(topic, holder) for holder in gpu.holders]
    if used > HELD_BYTES and not gpu.mig:
        return [
            _finding(
                topic,
                "warn",
                f"{gib(used)} are held by processes that cannot be seen from here (another container or user).",
                "On the host: nvidia-smi, then wait for them or ask their owner.",
            )
        ]
    return [_ok(topic, "No process holds its memory.")]


def _held(topic: str, holder: Holder) -> Finding:
    size = gib(holder.memory_bytes) if holder.memory_bytes is not None else "an unknown amount"
    who = f"pid {holder.pid} ({holder.name or 'not visible from here'}{f', {holder.user}' if holder.user else ''})"
    if holder.run:
        return _finding(topic, "warn", f"{who}, a job of {holder.run}, holds {size}.", f"harness cancel {holder.run}")
    mend = f"Wait for it, ask {holder.user or 'its owner'}, or end it if it is yours: kill {holder.pid}"
    return _finding(topic, "warn", f"{who} holds {size}.", mend)


# ---------------------------------------------------------------- the host


def host(host: Host, *, has_gpus: bool) -> list[Finding]:
    """Python, cores, memory, /dev/shm, limits and the token."""
    version = ".".join(map(str, host.python))
    return [
        _ok("python", f"Python {version} runs the control plane."),
        _cores(host),
        _memory(host),
        _shm(host),
        *_limits(host, has_gpus=has_gpus),
        _token(host),
    ]


def _cores(host: Host) -> Finding:
    if host.cores < QUICKSTART_CORES:
        mend = f"Give it {QUICKSTART_CORES} cores, or expect ranks that wait for each other."
        return _finding("cores", "warn", f"{host.cores} core, and two-rank cases want two.", mend)
    return _ok("cores", f"{host.cores} cores.")


def _memory(host: Host) -> Finding:
    text = f"{gib(host.memory_bytes)} of memory, {gib(host.available_bytes)} available"
    if host.memory_bytes < QUICKSTART_MEMORY_BYTES:
        return _finding("memory", "warn", f"{text}; the quickstart is made for 8 GB.", "Give the machine 8 GB or more.")
    if host.available_bytes < QUICKSTART_MEMORY_BYTES / 2:
        mend = "End what else uses memory: the kernel may kill a job."
        return _finding("memory", "warn", f"{text}.", mend)
    return _ok("memory", f"{text}.")


def _shm(host: Host) -> Finding:
    if host.shm_bytes is None:
        return _finding("/dev/shm", "bad", "There is no /dev/shm.", "mount -t tmpfs tmpfs /dev/shm")
    text = f"/dev/shm has {gib(host.shm_bytes)}, {gib(host.shm_free_bytes or 0)} free"
    mend = "In Docker: --shm-size=8g or --ipc=host. On the host: mount -o remount,size=8G /dev/shm"
    if host.shm_bytes < SHM_BYTES:
        return _finding("/dev/shm", "bad", f"{text}: ranks and servers share memory there and need 1 GiB.", mend)
    if (host.shm_free_bytes or 0) < SHM_BYTES:
        mend = "Remove what dead processes left there: ls -l /dev/shm"
        return _finding("/dev/shm", "warn", f"{text}.", mend)
    return _ok("/dev/shm", f"{text}.")


def _limits(host: Host, *, has_gpus: bool) -> list[Finding]:
    found = []
    if has_gpus and host.memlock.soft is not None:
        text = f"Locked memory is limited to {gib(host.memlock.soft)}: RDMA and pinned buffers may be refused."
        found.append(_finding("limits", "warn", text, "ulimit -l unlimited (Docker: --ulimit memlock=-1)"))
    if _below(host.stack, STACK_BYTES):
        text = "The stack is limited to less than 8 MiB."
        found.append(_finding("limits", "warn", text, "ulimit -s 65536 (Docker: --ulimit stack=67108864)"))
    if _below(Limit(soft=host.nofile.hard, hard=None), NOFILE):
        text = f"At most {host.nofile.hard} files can be open: a server under load has a socket for each request."
        found.append(_finding("limits", "warn", text, "Raise the hard limit (Docker: --ulimit nofile=65536)"))
    return found or [_ok("limits", f"Locked memory {_amount(host.memlock)}, open files {_amount(host.nofile)}.")]


def _below(limit: Limit, least: int) -> bool:
    return limit.soft is not None and limit.soft < least


def _amount(limit: Limit) -> str:
    soft, hard = ("unlimited" if value is None else str(value) for value in (limit.soft, limit.hard))
    return soft if soft == hard else f"{soft} (hard {hard})"


def _token(host: Host) -> Finding:
    if host.hf_token:
        return _ok("hugging face token", "A token is set; its value is never written anywhere.")
    text = "No token: weights come random, from a folder, or from repositories that need none."
    return _finding("hugging face token", "absent", text, "To fetch gated weights: export HF_TOKEN=...")


# ---------------------------------------------------------------- disk and variants


def runs_disk(disk: Disk) -> Finding:
    """Room for run directories."""
    text = f"{disk.free_bytes / GB:.1f} GB free at {disk.folder} for {disk.purpose}"
    mend = "Free some, remove old run directories, or choose another disk with --runs."
    if disk.free_bytes < RUNS_BYTES:
        status: State = "bad" if disk.free_bytes < RUNS_BYTES / 10 else "warn"
        return _finding("disk", status, f"{text}, too little for checkpoints and merged models.", mend)
    return _ok("disk", f"{text}.")


def variants(known: Mapping[str, Variant], fleet: GpuFleet, disk: Disk) -> list[Finding]:
    """Each variant's needs, as its vendor states them, against this machine."""
    return [_variant(variant, fleet, disk) for variant in known.values()]


def _variant(variant: Variant, fleet: GpuFleet, disk: Disk) -> Finding:
    topic, needs = f"variant {variant.name}", variant.needs
    room = disk.free_bytes >= needs.storage_gb * GB
    if not needs.gpus:
        text = f"Runs on a CPU and takes about {needs.storage_gb:g} GB of disk"
        mend = f"Free disk space at {disk.folder}."
        return _ok(topic, f"{text}.") if room else _finding(topic, "bad", f"{text}; that is not free.", mend)
    asked = (
        f"The vendor's recipe asks for {needs.gpus} GPUs of {needs.gpu_memory_gb:g} GB, {needs.storage_gb:g} GB disk"
    )
    if not fleet.gpus:
        mend = "Use a GPU host for it; here it can be planned (harness plan), not run."
        return _finding(topic, "absent", f"{asked}; no GPU is here.", mend)
    lacks = [*_lacking_gpus(needs, fleet), *([] if room else [f"{disk.free_bytes / GB:.0f} GB free at {disk.folder}"])]
    if not lacks:
        return _ok(topic, f"{asked}: all here.")
    mend = "Fewer or smaller GPUs may still do for LoRA and QLoRA: run a case and see. "
    mend += "" if room else f"For its weights free {needs.storage_gb:g} GB at {disk.folder} or set HF_HOME."
    return _finding(topic, "warn", f"{asked}; here: {', '.join(lacks)}.", mend.strip())


def _lacking_gpus(needs: Needs, fleet: GpuFleet) -> list[str]:
    """How the cards fall short of `needs`; empty where they do not."""
    large = [g for g in fleet.gpus if g.total_bytes >= CARD_TOLERANCE * needs.gpu_memory_gb * GB]
    if len(large) >= needs.gpus:
        return []
    sizes = ", ".join(sorted({f"{gpu.total_bytes / GB:.0f} GB" for gpu in fleet.gpus}))
    return [f"{len(fleet.gpus)} GPU(s) of {sizes}"]


# ---------------------------------------------------------------- environments, engines, network


def environment(name: str, missing: str | None, differences: Iterable[str]) -> Finding:
    """A payload environment: there, and what its lock says?"""
    topic, differing = f"environment {name}", tuple(differences)
    if missing is not None:
        mend = f"./tools/setup {name} (or --box found, where Python's own libraries are to be used)"
        return _finding(topic, "bad", f"Not usable: {missing}.", mend)
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        text = f"Not what its lock says: {differing[0]}{more}."
        return _finding(topic, "warn", text, f"rm -r .envs/{name} && ./tools/setup {name}")
    return _ok(topic, "Installed, and what its lock says.")


def engines(engines: Engines, *, has_gpus: bool) -> list[Finding]:
    """Docker, then what else can run a container."""
    found = [_docker(engines.docker, has_gpus=has_gpus)]
    if engines.commands:
        found.append(_ok("containers", ", ".join(f"{name} at {path}" for name, path in engines.commands.items()) + "."))
    else:
        text = "No apptainer, enroot or podman."
        found.append(_finding("containers", "absent", text, "Only needed for their boxes on a cluster: ask its admin."))
    return found


def _docker(docker: Docker, *, has_gpus: bool) -> Finding:
    if docker.version is None:
        denied = "permission" in docker.problem.lower()
        if denied:
            mend = "Add yourself to the docker group and log in again: usermod -aG docker $USER"
            return _finding("docker", "warn", "A Docker Engine is here and refuses this user.", mend)
        mend = "Only needed for the docker box: install Docker and start dockerd, or set DOCKER_HOST."
        return _finding("docker", "absent", "No Docker Engine answers.", mend)
    if has_gpus and "nvidia" not in docker.runtimes and not docker.cdi_devices:
        mend = "Install NVIDIA's container toolkit, then: nvidia-ctk runtime configure --runtime=docker"
        text = f"Docker Engine {docker.version} answers, and cannot give a container a GPU."
        return _finding("docker", "warn", text, mend)
    return _ok("docker", f"Docker Engine {docker.version} answers.")


def slurm(slurm: Slurm) -> Finding:
    """Does a Slurm answer, and is a node idle?"""
    if not slurm.installed:
        return _finding(
            "slurm", "absent", "No sinfo on PATH.", "Only needed for several hosts: run it on a login node."
        )
    if slurm.problem or not slurm.partitions:
        text = f"sinfo does not answer: {slurm.problem or 'it lists no partition'}."
        return _finding("slurm", "warn", text, "Look at slurmctld and munge: scontrol ping; systemctl status munge")
    listed = "; ".join(slurm.partitions)
    if not slurm.idle:
        return _finding(
            "slurm", "warn", f"No node is idle: {listed}.", "Jobs will wait; sinfo -R says why nodes are down."
        )
    return _ok("slurm", f"{listed}.")


def network(network: Network, *, has_gpus: bool) -> list[Finding]:
    """Which interface NCCL would take, and GPUDirect RDMA."""
    found = [_interfaces(network, has_gpus=has_gpus)]
    if network.infiniband and has_gpus:
        names = ", ".join(network.infiniband)
        if network.peermem:
            found.append(_ok("rdma", f"{names}, and nvidia-peermem is loaded."))
        else:
            text = f"{names} are here and nvidia-peermem is not loaded: traffic between hosts goes through host memory."
            found.append(_finding("rdma", "warn", text, "modprobe nvidia-peermem (or check that DMA-BUF is in use)"))
    return found


def _interfaces(network: Network, *, has_gpus: bool) -> Finding:
    listed = ", ".join(_interface(item) for item in network.interfaces) or "loopback alone"
    real = [item for item in network.interfaces if not item.virtual]
    if network.socket_ifname:
        return _ok("network", f"{listed}; NCCL_SOCKET_IFNAME={network.socket_ifname}.")
    if has_gpus and len(real) > 1:
        mend = f"For several hosts name the right one: export NCCL_SOCKET_IFNAME={real[0].name}"
        return _finding("network", "warn", f"Several interfaces, and NCCL may take the wrong one: {listed}.", mend)
    return _ok("network", f"{listed}.")


def _interface(item: Interface) -> str:
    speed = f" {item.speed_mbit_per_s / 1000:g} Gbit/s" if item.speed_mbit_per_s else ""
    return f"{item.name}{speed}"
