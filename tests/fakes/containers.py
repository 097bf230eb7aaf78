"""Real containers whose payload is a stub: a small image, a docker box that starts it, and looks at what is left.

`python containers.py ARGUMENTS` is `harness ARGUMENTS` with that box as `docker`; STUBS is as in stub_box.py, and
STUB_CHECKOUT names the folder whose `images.lock` it reads.
"""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fakes import fake_engine, stub_box

from harness import boxes
from harness.backends import container
from harness.boxes.docker import DockerBox
from harness.schema import Command, Job, Mount

FAKES = Path(__file__).resolve().parent
ROOT = FAKES.parent.parent


def docker(*arguments: str, host: str | None = None, **options: Any) -> str:
    """What the Engine answers; fails where it refuses."""
    env = os.environ | ({"DOCKER_HOST": host} if host else {}) | {"DOCKER_BUILDKIT": "0"}
    done = subprocess.run(["docker", *arguments], env=env, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@cache
def image() -> str:
    """Id of an image of Debian and a Python without libraries, on the base of the real ones."""
    # Its first line: base, the digest, its name.
    base = subprocess.run([str(ROOT / "tools/base")], capture_output=True, text=True, check=True).stdout.split()[1]
    recipe = f'FROM {base}\nRUN ["ln", "-s", "/usr/bin/python3.11", "/usr/local/bin/python"]\n'
    return docker("build", "--quiet", "--network", "none", "-", input=recipe).splitlines()[-1]


def checkout(folder: Path) -> Path:
    """A checkout whose `images.lock` has that image for everything."""
    fake_engine.lock(folder, image=image())
    return folder


class StubDocker(DockerBox):
    """The docker box with the payload of `case_payload.py`, told how each attempt at a job shall go."""

    def __init__(self, root: Path, behaviour: stub_box.Behaviour = ()) -> None:
        super().__init__(root)
        self.behaviour = behaviour

    def wrap(self, job: Job, job_dir: Path, payload_root: Path) -> Command:
        fake: dict[str, Any] = {}
        for pattern, options in self.behaviour:
            if fnmatch.fnmatch(job_dir.name, pattern):
                fake |= options
        stub = {
            "argv": ("python", "-S", str(FAKES / "case_payload.py")),
            "env": job.env | {"FAKE": json.dumps(fake)},
            "mounts": (Mount(path=str(FAKES)),),
        }
        return super().wrap(job.model_copy(update=stub), job_dir, payload_root)


def command(job: Job, job_dir: Path, root: Path) -> Command:
    """A stub job in a container of the checkout at `root`; it sees this checkout, as its payload's code."""
    run_dir = job_dir.parent.parent
    (run_dir / "payload").mkdir(parents=True, exist_ok=True)
    stub = {"mounts": (Mount(path=str(ROOT)),), "env": {"PYTHONPATH": str(ROOT)} | job.env}
    return DockerBox(root).wrap(job.model_copy(update=stub), job_dir, run_dir / "payload")


def left(run_dir: Path, host: str | None = None) -> list[str]:
    """Names of the containers of a run directory, those that ended too."""
    label = f"label={container.LABEL}={run_dir.resolve()}"
    return docker("container", "ls", "--all", "--filter", label, "--format", "{{.Names}}", host=host).split()


if __name__ == "__main__":
    from harness import cli

    text = Path(os.environ["STUBS"]).read_text() if "STUBS" in os.environ else "[]"
    boxes.REGISTRY["docker"] = lambda _: StubDocker(Path(os.environ["STUB_CHECKOUT"]), json.loads(text))
    sys.exit(cli.main())
