"""What every test gets: a guard around unmarked tests, services or a visible skip, and an order that fails fast.

Unmarked tests are refused the network, Docker, Slurm and GPUs. A marked test uses the real thing; where that is not
installed it is skipped with the reason, or fails under HARNESS_REQUIRE_SERVICES=1.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from fakes.stub_run import Bench, stubbed

ROOT = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A matrix whose jobs are stubs."""
    return stubbed(tmp_path, monkeypatch)


# ---------------------------------------------------------------- services


def _envs() -> Path:
    return Path(os.environ.get("HARNESS_ENVS") or ROOT / ".envs").resolve()


def _environment(name: str) -> str | None:
    python = _envs() / name / "bin/python"
    return None if os.access(python, os.X_OK) else f"no {name} environment at {_envs()}: tools/setup {name}"


def _answers(*argv: str) -> bool:
    """Does a command exist and end well within ten seconds, with something to say?"""
    try:
        return bool(subprocess.run(argv, capture_output=True, timeout=10, check=True).stdout.strip())
    except (OSError, subprocess.SubprocessError):
        return False


def _docker() -> str | None:
    import docker

    try:
        client = docker.from_env(timeout=5)
        client.ping()
        client.close()
    except (docker.errors.DockerException, OSError) as error:
        return f"no Docker Engine answers ({type(error).__name__}): install docker.io and start dockerd"
    return None


SERVICES: dict[str, Callable[[], str | None]] = {
    "payload": lambda: _environment("train"),
    "server": lambda: _environment("serve"),
    "browser": lambda: None if shutil.which("chromium") else "no chromium on PATH: apt-get install chromium",
    "docker": _docker,
    "slurm": lambda: None if _answers("sinfo", "-h") else "no Slurm answers sinfo: install slurmctld and slurmd",
    "gpu": lambda: None if _answers("nvidia-smi", "-L") else "no GPU that nvidia-smi lists",
}
"""By marker: why the service cannot be used here, or `None`. In the order in which the tests run."""
NOT_INSTALLABLE = frozenset({"gpu"})
"""What no installation can bring to a machine: its absence is a skip even where services are required."""


@cache
def absence(marker: str) -> str | None:
    """Why the service of `marker` is not to be had; asked once."""
    return SERVICES[marker]()


def _marks(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()} & {*SERVICES, "long"}


def stage(item: pytest.Item) -> int:
    """When an item runs: unmarked first, then payload, server, e2e, browser and so on; long ones last."""
    marks = _marks(item)
    if "long" in marks:
        return 100
    if "e2e" in item.path.relative_to(ROOT).parts and marks:
        return 25
    return max((10 * (index + 1) for index, name in enumerate(SERVICES) if name in marks), default=0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that take minutes too")
    parser.addoption("--fast", action="store_true", help="run the unmarked tests alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=stage)
    unwanted = set(SERVICES) | {"long"} if config.getoption("--fast") else set()
    if not config.getoption("--long"):
        unwanted.add("long")
    left_out = [item for item in items if _marks(item) & unwanted]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not _marks(item) & unwanted]


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = os.environ.get("HARNESS_REQUIRE_SERVICES") == "1"
    for marker in sorted(_marks(item) & set(SERVICES)):
        if reason := absence(marker):
            if required and marker not in NOT_INSTALLABLE:
                pytest.fail(f"{reason} (HARNESS_REQUIRE_SERVICES=1 makes this skip a failure)", pytrace=False)
            pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Stop before a slower stage where a quicker one failed."""
    result = yield
    if nextitem is not None and item.session.testsfailed and stage(nextitem) > stage(item):
        item.session.shouldfail = f"{item.session.testsfailed} failed before a slower stage began: it was left out"
    return result


@pytest.fixture(scope="session")
def environments() -> Path:
    """The folder of the payload environments `train` and `serve`: HARNESS_ENVS, or this checkout's."""
    return _envs()


@pytest.fixture(scope="session")
def cpu_images() -> dict[str, Any]:
    """Both CPU images by environment, as `harness build` leaves them: built once, then found unchanged."""
    from harness.containers import build

    requests = build.requests(None, "cpu", None, None, 2)
    return {one.environment: build.build(one, ROOT, print) for one in requests}


# ---------------------------------------------------------------- the guard

REFUSED_PROGRAMS = frozenset(
    {"docker", "dockerd", "podman", "apptainer", "singularity", "enroot", "nvidia-smi"}
    | {"sbatch", "srun", "salloc", "scancel", "squeue", "sinfo", "sacct", "scontrol"}
    | {"curl", "wget", "ssh", "scp", "rsync", "apt-get", "pip", "uv"}
)
LOCAL_NAMES = frozenset({None, "", "localhost", b"localhost"})


def is_loopback(host: object) -> bool:
    """Is `host` this machine, by name or number?"""
    if host in LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host)).is_loopback
    except ValueError:
        return False


def may_connect(family: int, address: Any) -> bool:
    """May an unmarked test talk to this address? Loopback, or a socket file that is no system service's."""
    if family == socket.AF_UNIX:
        path = os.fsdecode(address)
        return not path.startswith(("/run/", "/var/run/"))
    return isinstance(address, tuple) and is_loopback(address[0])


def refused_program(arguments: Any, path: str | None) -> str | None:
    """The program that an unmarked test may not start, or `None`; a fake below tests/ or a temporary folder may run."""
    if isinstance(arguments, (str, bytes, os.PathLike)):
        first = (os.fsdecode(arguments).split() or [""])[0]
    else:
        first = os.fsdecode(next(iter(arguments), ""))
    found = shutil.which(first, path=path)
    if found is None or Path(first).name not in REFUSED_PROGRAMS:
        return None
    fakes = (ROOT / "tests", Path(tempfile.gettempdir()))
    return None if any(Path(found).is_relative_to(folder) for folder in fakes) else found


@pytest.fixture(autouse=True)
def guard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse an unmarked test the network, Docker, Slurm and GPUs, and fail it even where it swallowed the refusal."""
    if _marks(request.node) - {"long"}:
        yield
        return
    refusals: list[str] = []

    def refuse(what: str) -> None:
        refusals.append(what)
        pytest.fail(f"an unmarked test reached for {what}: mark it, or give it a fake", pytrace=True)

    _guard_sockets(monkeypatch, refuse)
    _guard_programs(monkeypatch, refuse)
    _guard_devices(monkeypatch)
    yield
    if refusals:
        pytest.fail(f"an unmarked test reached for {', '.join(refusals)}", pytrace=False)


def _guard_sockets(monkeypatch: pytest.MonkeyPatch, refuse: Callable[[str], None]) -> None:
    def checked(name: str) -> Callable[..., Any]:
        real = getattr(socket.socket, name)

        def call(self: socket.socket, *arguments: Any) -> Any:
            if not may_connect(self.family, arguments[-1]):
                refuse(f"the network ({arguments[-1]!r})")
            return real(self, *arguments)

        return call

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, checked(name))
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        if not is_loopback(host):
            refuse(f"the network (name {host!r})")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def _guard_programs(monkeypatch: pytest.MonkeyPatch, refuse: Callable[[str], None]) -> None:
    start = subprocess.Popen.__init__

    def init(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        path = (options.get("env") or os.environ).get("PATH")
        if program := refused_program(args, path):
            refuse(program)
        start(self, args, *rest, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", init)


def _guard_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with no GPU and no Docker, for child processes too."""
    import pynvml

    def no_driver(*_: Any) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    monkeypatch.setattr(pynvml, "nvmlInitWithFlags", no_driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
