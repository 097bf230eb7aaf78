"""The box of pinned containers: images of `images/images.lock`, started by the Docker Engine of this host.

A container has the job's GPUs and no others, no network, no capabilities, a root file system that nothing can change,
and one place to write to: the run directory. Its images are made by `harness build`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import harness
from harness import hub
from harness.boxes.variables import allowed
from harness.containers import engine, imagelock, requirements
from harness.errors import HarnessError
from harness.schema import Command, DeviceType, Environment, EnvironmentName, Job

CLIENT = frozenset({
    "PATH", "HOME", "XDG_RUNTIME_DIR", "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "DOCKER_CERT_PATH",
    "DOCKER_TLS_VERIFY",
})  # fmt: skip
"""What the `docker` command itself needs to find its Engine; nothing of it reaches the container."""
SITE = ("NCCL_", "GLOO_", "UCX_", "NVSHMEM_", "TORCH_")
"""Settings of a site that mean the same inside: those that name no path and no device of the host."""
LOCAL_ONLY = ("_SOCKET_IFNAME", "_FILE", "_HOME", "_DIR", "_NET_DEVICES", "_IB_HCA")
"""Endings of those that do name one."""

CACHE = "cache"
"""Folder of the run directory for what libraries keep: one warm Triton cache for all cases of a run."""
CACHES = {
    "HOME": "",
    "XDG_CACHE_HOME": "",
    "CUDA_CACHE_PATH": "cuda",
    "HF_HOME": "huggingface",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "VLLM_CACHE_ROOT": "vllm",
}
IDENTITY = {"USER": "harness", "LOGNAME": "harness"}
"""The caller's uid has no name in the image, and libraries ask for one."""

SHM_SIZE = "16g"
"""A limit and no reservation: NCCL's rings and vLLM's workers need far more than Docker's 64 MiB."""
STACK_BYTES = 64 * 2**20
"""What NVIDIA's own containers ask for: `--ulimit stack=67108864`."""
LOOPBACK = frozenset({"", "lo"})
MARK = "HARNESS_JOB"
"""Passed on by name, so that a supervisor knows the container's processes among those of the host."""
LABEL = "harness.run"
CLEAN_UP = Path(harness.__file__).resolve().parent / "backends" / "container.py"


class DockerBox:
    """Containers of the images that `images/images.lock` names, and of no others."""

    name = "docker"

    def __init__(self, root: Path | None = None) -> None:
        self._root = root.absolute() if root else imagelock.CHECKOUT
        self._images: dict[tuple[EnvironmentName, DeviceType], imagelock.Image] = {}

    def _image(self, name: EnvironmentName, device: DeviceType) -> imagelock.Image:
        """The image in the lock, read once: a build beside a run changes nothing for its later jobs."""
        if (name, device) not in self._images:
            self._images[name, device] = imagelock.read(imagelock.path_of(self._root)).image(name, device)
        return self._images[name, device]

    def environment(self, name: EnvironmentName, device: DeviceType = "cpu") -> Environment:
        """The image for this device as the lock names it; HarnessError where it drifted or is not in the Engine."""
        image = self._image(name, device)
        _refuse_stale(image, self._root / "images" / name / f"{device}.txt", f"harness build {name} --variant {device}")
        _refuse_drifted(image, name, device)
        libraries = dict(image.versions)
        return Environment(
            name=name,
            box=self.name,
            digest=image.image,
            pinned=True,
            python=libraries.pop("python", ""),
            libraries=libraries,
        )

    def differences(self, name: EnvironmentName) -> tuple[str, ...]:
        """None: what differs from the lock is refused by `environment`."""
        self.environment(name)
        return ()

    def wrap(self, job: Job, job_dir: Path, payload_root: Path) -> Command:
        """`docker run` of the job's image, and how to end it from outside."""
        if job.nodes > 1:
            why = f"{job.id} is spread over {job.nodes} hosts, and a container of the docker box sees none but its own"
            raise HarnessError(why, "use --box pyxis or apptainer for it")
        client = {name: value for name, value in os.environ.items() if name in CLIENT}
        folder, payload = job_dir.absolute(), payload_root.absolute()
        name = container_name(folder)
        argv = (
            shutil.which("docker") or "docker",
            "run",
            *("--name", name),
            *_labels(job, folder, payload.parent),
            *_limits(job),
            *_isolation(job),
            *_devices(job),
            *_mounts(job, payload),
            *_variables(job, payload),
            *("--workdir", str(folder)),
            self._image(job.environment, job.device).image,
            *job.argv,
        )
        cleanup = (sys.executable, "-I", "-S", str(CLEAN_UP), name)
        return Command(argv=argv, env=client, cwd=str(job_dir), cleanup=cleanup)


def container_name(job_dir: Path) -> str:
    """One name per job directory of this host, so that whoever finds the directory can end the container."""
    mark = hashlib.sha256(str(job_dir).encode()).hexdigest()[:8]
    return f"harness-{re.sub(r'[^a-zA-Z0-9_.-]', '-', job_dir.name)}-{mark}"


# ---------------------------------------------------------------- is the image the one that the lock means


def _refuse_stale(image: imagelock.Image, lock: Path, build: str) -> None:
    """HarnessError where the requirements changed since the image was built."""
    if lock.exists() and requirements.digest(lock) != image.lock:
        changed = f"images/{lock.parent.name}/{lock.name} has changed since its image was built"
        raise HarnessError(changed, f"build it again: {build}")


def _refuse_drifted(image: imagelock.Image, name: EnvironmentName, device: DeviceType) -> None:
    """HarnessError where the Engine lacks the image, and what it has under the image's name instead."""
    if not engine.address().startswith("unix://"):
        remote = f"DOCKER_HOST={engine.address()} is an Engine of another host, which cannot see the run directory"
        raise HarnessError(remote, "start harness on that host, or unset DOCKER_HOST")
    client = engine.connect()
    try:
        if engine.inspect(client, image.image):
            return
        tagged = engine.inspect(client, f"harness-{name}:{device}")
    finally:
        client.close()
    lacking = f"this Engine does not have the {name}-{device} image of images/images.lock ({image.image[:19]})"
    if tagged:
        lacking += f"; its harness-{name}:{device} is another, {tagged['Id'][:19]}"
    raise HarnessError(lacking, f"build it: harness build {name} --variant {device}")


# ---------------------------------------------------------------- docker run


def _labels(job: Job, job_dir: Path, run_dir: Path) -> Iterable[str]:
    return (
        "--label",
        f"{LABEL}={run_dir}",
        "--label",
        f"harness.job={job_dir.name}",
        "--label",
        f"harness.id={job.id}",
    )


def _limits(job: Job) -> Iterable[str]:
    yield from ("--shm-size", SHM_SIZE, "--ulimit", f"stack={STACK_BYTES}")
    if job.device == "cuda":  # pages are locked for a GPU or a network card; many a host refuses to lift it
        yield from ("--ulimit", "memlock=-1")
    if job.host_memory_gib is not None:
        limit = f"{round(job.host_memory_gib * 2**30)}b"
        yield from ("--memory", limit, "--memory-swap", limit)


def _isolation(job: Job) -> Iterable[str]:
    host = os.uname().nodename
    yield from ("--init", "--pull", "never", "--log-driver", "none", "--user", f"{os.getuid()}:{os.getgid()}")
    yield from ("--security-opt", "no-new-privileges", "--cap-drop", "ALL", "--read-only")
    yield from ("--tmpfs", "/tmp:rw,exec,nosuid,nodev,mode=1777")
    if _interfaces(job):  # a job about one of them, such as a probe, needs it
        yield from ("--network", "host")
    else:
        yield from ("--network", "none", "--hostname", host, "--add-host", f"{host}:127.0.0.1")


def _interfaces(job: Job) -> set[str]:
    """Network interfaces of the host that the job itself asks for."""
    asked = {value for name, value in job.env.items() if name.endswith("_SOCKET_IFNAME")}
    return asked - LOOPBACK


def _devices(job: Job) -> Iterable[str]:
    if job.device == "cuda":
        # The quotes are for docker, which reads the value as a line of CSV.
        yield from ("--gpus", f'"device={",".join(_gpus(job))}"')


def _gpus(job: Job) -> list[str]:
    """The driver's numbers of the job's GPUs; the first ones where none were given."""
    given = job.env.get("CUDA_VISIBLE_DEVICES", "")
    return given.split(",") if given else [str(number) for number in range(job.devices)]


def _mounts(job: Job, payload: Path) -> Iterable[str]:
    """Every path is the same inside and outside, so that what a record says of a path holds in both."""
    yield from ("--mount", _bind(str(payload.parent), writable=True))
    yield from ("--mount", _bind(str(payload), writable=False))
    for mount in job.mounts:
        yield from ("--mount", _bind(mount.path, writable=mount.writable))
    if _wants_hub(job.payload) and hub.cache().is_dir():
        yield from ("--mount", _bind(str(hub.cache()), writable=False))


def _wants_hub(value: object) -> bool:
    """Whether a payload says `weights: hub` somewhere."""
    if isinstance(value, dict):
        return value.get("weights") == "hub" or any(map(_wants_hub, value.values()))
    return isinstance(value, list) and any(map(_wants_hub, value))


def _bind(path: str, *, writable: bool) -> str:
    quoted = [f'"{name}={path}"' if '"' in path or "," in path else f"{name}={path}" for name in ("source", "target")]
    return ",".join(["type=bind", *quoted, *([] if writable else ["readonly"])])


def _variables(job: Job, payload: Path) -> Iterable[str]:
    fetched = {"HF_HUB_CACHE": str(hub.cache())} if _wants_hub(job.payload) else {}
    found = dict(sorted((_own(payload) | fetched | _site(os.environ) | job.env | _visible(job)).items()))
    yield from ("--env", MARK)
    for name, value in found.items():
        yield from ("--env", f"{name}={value}")


def _own(payload: Path) -> dict[str, str]:
    cache = payload.parent / CACHE
    return IDENTITY | {"PYTHONPATH": str(payload)} | {name: str(cache / folder) for name, folder in CACHES.items()}


def _site(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in allowed(environment).items()
        if name.startswith(SITE) and not name.endswith(LOCAL_ONLY)
    }


def _visible(job: Job) -> dict[str, str]:
    """Inside, a job's GPUs are numbered from 0."""
    if job.device == "cpu":
        return {"NVIDIA_VISIBLE_DEVICES": "void"}
    inside = ",".join(str(number) for number in range(len(_gpus(job))))
    return {"CUDA_VISIBLE_DEVICES": inside, "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
