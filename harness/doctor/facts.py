"""What the probes found and what the judges say of it: frozen types, nothing else."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from harness.schema import Frozen

State = Literal["ok", "warn", "bad", "absent"]
"""`absent`: not here, which is no fault of a machine that was not meant to have it."""


class Finding(Frozen):
    """One thing that this machine has, lacks or has wrong."""

    topic: str
    status: State
    text: str
    """One sentence."""
    mend: str = ""
    """What to do; never empty where the status is not `ok`."""

    @model_validator(mode="after")
    def _says_what_to_mend(self) -> Finding:
        if self.status != "ok" and not self.mend:
            raise ValueError(f"the finding on {self.topic} does not say what to mend")
        return self


class Findings(Frozen):
    """All findings, in the order in which a person should read them."""

    findings: tuple[Finding, ...]

    @property
    def bad(self) -> tuple[Finding, ...]:
        """Those that would make a run fail here."""
        return tuple(finding for finding in self.findings if finding.status == "bad")


class Holder(Frozen):
    """A process that holds GPU memory."""

    pid: int
    name: str | None
    """`None` where the process cannot be seen from here, such as from inside a container."""
    user: str | None
    memory_bytes: int | None
    """`None` where the driver does not say."""
    run: str | None = None
    """The run directory that it works in, where it is one of ours."""


class GpuState(Frozen):
    """One GPU now; `None` where the driver or the card does not say."""

    index: int
    name: str
    uuid: str
    bus_id: str
    total_bytes: int
    free_bytes: int
    temperature_c: int | None = None
    slowdown_c: int | None = None
    """Temperature at which the card slows itself down."""
    slowed_by: tuple[str, ...] = ()
    """Hardware reasons for which its clocks are held down now."""
    ecc_uncorrected: int | None = None
    """Uncorrected memory errors since the driver was loaded."""
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    mig: bool | None = None
    holders: tuple[Holder, ...] = ()


class GpuFleet(Frozen):
    """The GPUs of this host, and the driver that they share."""

    gpus: tuple[GpuState, ...] = ()
    driver: str | None = None
    """Version of the driver's library."""
    kernel_driver: str | None = None
    """Version of the loaded kernel module."""
    cuda: str | None = None
    """Newest CUDA that the driver runs."""
    problem: str = ""
    """Why the driver does not answer, in its words; empty where it does."""
    device_nodes: bool = False
    """Is there a GPU's device file, whatever the driver says?"""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    order: str | None = None
    """CUDA_DEVICE_ORDER."""


class Limit(Frozen):
    """A resource limit of this shell; `None` for unlimited."""

    soft: int | None
    hard: int | None


class Host(Frozen):
    """What this host has, GPUs apart."""

    python: tuple[int, int, int]
    cores: int
    memory_bytes: int
    available_bytes: int
    shm_bytes: int | None
    """Size of /dev/shm."""
    shm_free_bytes: int | None
    memlock: Limit
    stack: Limit
    nofile: Limit
    hf_token: bool
    """Is a Hugging Face token set? Its value is never read into a finding."""


class Disk(Frozen):
    """The free space where a folder is, or will be."""

    purpose: str
    folder: str
    free_bytes: int


class Interface(Frozen):
    """A network interface that is up and not loopback."""

    name: str
    speed_mbit_per_s: int | None
    virtual: bool


class Network(Frozen):
    """What NCCL would find."""

    interfaces: tuple[Interface, ...]
    infiniband: tuple[str, ...]
    peermem: bool
    """Is nvidia-peermem loaded?"""
    socket_ifname: str | None
    """NCCL_SOCKET_IFNAME."""


class Docker(Frozen):
    """The Docker Engine, where one answers."""

    version: str | None
    problem: str = ""
    runtimes: tuple[str, ...] = ()
    cdi_devices: int = 0


class Engines(Frozen):
    """Whoever can run a container here."""

    docker: Docker
    commands: dict[str, str]
    """apptainer, singularity, enroot, podman: the path of each that is on PATH."""


class Slurm(Frozen):
    """What sinfo says."""

    installed: bool
    problem: str = ""
    partitions: tuple[str, ...] = ()
    """A line each: partition, nodes, state, generic resources."""
    idle: bool = False
    """Is any node idle?"""
