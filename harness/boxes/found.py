"""The box of whatever Python is there: `$HARNESS_PYTHON`, or the `python3` on PATH. Never pinned, and shown so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from harness.boxes.variables import allowed
from harness.errors import HarnessError
from harness.installed import installed
from harness.schema import Command, DeviceType, Environment, EnvironmentName, Job

VARIABLE = "HARNESS_PYTHON"


class FoundBox:
    """One interpreter, as it is, for every environment."""

    name = "found"

    def __init__(self, root: Path | None = None) -> None:
        del root  # An interpreter that is found belongs to no checkout.

    def environment(self, name: EnvironmentName, device: DeviceType = "cpu") -> Environment:
        """What the interpreter has, PYTHONPATH included."""
        found = installed(_python(), _python_path())
        return Environment(
            name=name,
            box=self.name,
            digest=found.digest,
            pinned=False,
            python=found.python,
            libraries=found.libraries,
        )

    def differences(self, name: EnvironmentName) -> tuple[str, ...]:
        """One sentence: nothing pins it."""
        return (f"the {name} environment is {_python()} as it is, which no lock describes",)

    def wrap(self, job: Job, job_dir: Path, payload_root: Path) -> Command:
        """The interpreter with the allowed variables; its own PYTHONPATH stays, behind the payload's code."""
        env = allowed(os.environ)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(payload_root), _python_path())))
        return Command(argv=(_python(), *job.argv[1:]), env=env | job.env, cwd=str(job_dir))


def _python_path() -> str:
    """This process's PYTHONPATH with every entry absolute: a job runs in another directory."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(str(Path(entry).absolute()) for entry in entries if entry)


def _python() -> str:
    """The interpreter's absolute path, its links left as they are: a virtual environment is known by its link."""
    asked = os.environ.get(VARIABLE)
    found = shutil.which(asked or "python3")
    if not found:
        what = f"{VARIABLE}={asked} is no program" if asked else "there is no python3 on PATH"
        raise HarnessError(what, f"set {VARIABLE} to a Python that has the libraries, or use --box venv")
    return str(Path(found).absolute())
