"""The box of Apptainer images (SIF files): `apptainer exec`, for clusters without a Docker Engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from harness.boxes import imagefile
from harness.boxes.variables import allowed
from harness.schema import Command, DeviceType, Environment, EnvironmentName, Job


class ApptainerBox:
    """Containers of SIF files, one for each environment."""

    name = "apptainer"

    def __init__(
        self, root: Path | None = None, images: Mapping[EnvironmentName, str] | None = None,
        mounts: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        del root  # An image file belongs to no checkout.
        self._images, self._mounts = images or {}, mounts

    def environment(self, name: EnvironmentName, device: DeviceType = "cpu") -> Environment:
        """The image file, by the digest of its bytes; one for all devices."""
        return imagefile.environment(self.name, self._images, name)

    def differences(self, name: EnvironmentName) -> tuple[str, ...]:
        """None: the file is its own lock."""
        return ()

    def wrap(self, job: Job, job_dir: Path, payload_root: Path) -> Command:
        """`apptainer exec` of the job's image; every path is the same inside and outside.

        The environment passes through, so that a scheduler's variables and a site's reach the payload.
        """
        binds = [f"{payload_root.parent}", *(mount.path for mount in job.mounts), *self._mounts]
        argv = (
            "apptainer", "exec", "--no-home", *(("--nv",) if job.device == "cuda" else ()),
            *(part for bind in dict.fromkeys(binds) for part in ("--bind", f"{bind}:{bind}")),
            "--pwd", str(job_dir), imagefile.image(self._images, job.environment), *job.argv,
        )  # fmt: skip
        env = allowed(os.environ) | {"PYTHONPATH": str(payload_root)}
        return Command(argv=argv, env=env | job.env, cwd=str(job_dir))
