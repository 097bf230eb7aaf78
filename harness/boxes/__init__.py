"""Where a payload's libraries come from: a box turns a job's argv into a command and says what is installed.

To add a box: one module with a class that has the members of `Box`, and one line in `REGISTRY`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from harness.boxes.apptainer import ApptainerBox
from harness.boxes.docker import DockerBox
from harness.boxes.found import FoundBox
from harness.boxes.pyxis import PyxisBox
from harness.boxes.venv import VenvBox, environments_root
from harness.catalog import nearest
from harness.errors import HarnessError
from harness.schema import Command, DeviceType, Environment, EnvironmentName, Job

__all__ = ["MEMORY_LIMITED", "REGISTRY", "SUPERVISED", "Box", "environments_root", "get", "of_site"]


class Box(Protocol):
    """A place to run payloads in."""

    @property
    def name(self) -> str:
        """The word for it on the command line."""
        ...

    def environment(self, name: EnvironmentName, device: DeviceType = "cpu") -> Environment:
        """What is installed for payloads of kind `name` on that device; HarnessError saying how to make it where it is
        missing."""
        ...

    def differences(self, name: EnvironmentName) -> tuple[str, ...]:
        """Each way in which it differs from its lock, a sentence each; empty where it is pinned."""
        ...

    def wrap(self, job: Job, job_dir: Path, payload_root: Path) -> Command:
        """The command that runs `job` in `job_dir` with the payload code of `payload_root`; pure but for reading the
        environment variables that are let through."""
        ...


REGISTRY: dict[str, Callable[[Path | None], Box]] = {
    "venv": VenvBox,
    "docker": DockerBox,
    "found": FoundBox,
    "apptainer": ApptainerBox,
    "pyxis": PyxisBox,
}
MEMORY_LIMITED = ("docker",)
"""Boxes that hold a job to its `host_memory_gib`."""
SUPERVISED = ("docker",)
"""Boxes whose jobs need somebody to run their `cleanup`, as the supervisor of the local backend does."""


def get(name: str, root: Path | None = None) -> Box:
    """The box called `name` for the checkout at `root` (default: this one); HarnessError where there is none."""
    if name not in REGISTRY:
        raise HarnessError(f"no box is called {name!r}{nearest(name, REGISTRY)}", f"There are: {', '.join(REGISTRY)}.")
    return REGISTRY[name](root)


def of_site(name: str, images: Mapping[EnvironmentName, str], mounts: tuple[str, ...]) -> Box:
    """The box that a cluster's site file names, with its images and host paths where it takes them."""
    if name == "apptainer":
        return ApptainerBox(None, images, mounts)
    return PyxisBox(None, images, mounts) if name == "pyxis" else get(name)
