"""The box of Slurm's container plug-in pyxis (over enroot): options of `srun`, so it works under Slurm alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from harness.boxes import imagefile
from harness.boxes.variables import allowed
from harness.schema import Command, DeviceType, Environment, EnvironmentName, Job


class PyxisBox:
    """Containers that srun starts, one image for each environment."""

    name = "pyxis"

    def __init__(
        self, root: Path | None = None, images: Mapping[EnvironmentName, str] | None = None,
        mounts: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        del root  # A registry's image belongs to no checkout.
        self._images, self._mounts = images or {}, mounts

    def environment(self, name: EnvironmentName, device: DeviceType = "cpu") -> Environment:
        """The image by its digest in the registry, or by that of its squashfs file; one for all devices."""
        return imagefile.environment(self.name, self._images, name)

    def differences(self, name: EnvironmentName) -> tuple[str, ...]:
        """None: the digest pins it."""
        return ()

    def wrap(self, job: Job, job_dir: Path, payload_root: Path) -> Command:
        """`srun` with the container's options; every path is the same inside and outside.

        `--container-env` makes the job's own variables win over those of the image, where both name one.
        """
        binds = [str(payload_root.parent), *(mount.path for mount in job.mounts), *self._mounts]
        env = {"PYTHONPATH": str(payload_root)} | job.env
        argv = (
            "srun",
            f"--container-image={imagefile.image(self._images, job.environment)}",
            f"--container-mounts={','.join(f'{bind}:{bind}' for bind in dict.fromkeys(binds))}",
            f"--container-workdir={job_dir}",
            f"--container-env={','.join(sorted(env))}",
            "--no-container-mount-home",
            *job.argv,
        )
        return Command(argv=argv, env=allowed(os.environ) | env, cwd=str(job_dir))
