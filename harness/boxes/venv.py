"""The box of virtual environments made by `./tools/setup` from hash-locked requirements: `.envs/<environment>`."""

from __future__ import annotations

import os
from pathlib import Path

import harness
from harness.boxes.variables import allowed
from harness.errors import HarnessError
from harness.installed import Installed, installed, lock_differences, read_lock
from harness.schema import Command, DeviceType, Environment, EnvironmentName, Job

LOCKS = ("cpu.txt", "cuda.txt")
"""Hash-locked requirements of an environment, in images/<environment>/."""

CHECKOUT = Path(harness.__file__).resolve().parent.parent


def environments_root() -> Path:
    """The folder of the virtual environments: `$HARNESS_ENVS`, or that of this checkout."""
    return Path(os.environ.get("HARNESS_ENVS") or CHECKOUT / ".envs").absolute()


class VenvBox:
    """Interpreters of `<folder>/<environment>`, held against the locks of the checkout."""

    name = "venv"

    def __init__(self, root: Path | None = None) -> None:
        self._folder = root.absolute() / ".envs" if root else environments_root()
        self._images = (root.absolute() if root else CHECKOUT) / "images"

    def _python(self, name: EnvironmentName) -> Path:
        return self._folder / name / "bin" / "python"

    def _installed(self, name: EnvironmentName) -> Installed:
        python = self._python(name)
        if not python.exists():
            raise HarnessError(f"the {name} environment is missing: {python}", f"make it with ./tools/setup {name}")
        return installed(str(python))

    def environment(self, name: EnvironmentName, device: DeviceType = "cpu") -> Environment:
        """What is installed; pinned where it is what one of the environment's locks says."""
        found = self._installed(name)
        return Environment(
            name=name,
            box=self.name,
            digest=found.digest,
            pinned=not self.differences(name),
            python=found.python,
            libraries=found.libraries,
        )

    def differences(self, name: EnvironmentName) -> tuple[str, ...]:
        """How what is installed differs from the lock that it is nearest to; empty where it does not."""
        found = self._installed(name)
        files = [path for lock in LOCKS if (path := self._images / name / lock).exists()]
        if not files:
            return (f"there is no lock in images/{name}",)
        each = [lock_differences(found.distributions, read_lock(path.read_text(encoding="utf-8"))) for path in files]
        return min(each, key=len)

    def wrap(self, job: Job, job_dir: Path, payload_root: Path) -> Command:
        """The environment's python with the allowed variables, the payload's code and the job's own variables."""
        python = self._python(job.environment)
        env = allowed(os.environ)
        env["PATH"] = f"{python.parent}:{env.get('PATH', os.defpath)}"
        env["PYTHONPATH"] = str(payload_root)
        return Command(argv=(str(python), *job.argv[1:]), env=env | job.env, cwd=str(job_dir))
