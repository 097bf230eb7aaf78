"""Asking an image what is in it: a container without network runs `inside.py`, and its words become values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from harness.containers import engine
from harness.errors import HarnessError
from harness.installed import THAT_MATTER, normalised
from harness.schema import Frozen

if TYPE_CHECKING:
    from docker import DockerClient


INSIDE = Path(__file__).with_name("inside.py")


class Distribution(Frozen):
    """One installed package."""

    version: str
    imports: tuple[str, ...]
    """Its top-level import names; none for one that only brings libraries or programs."""


class Contents(Frozen):
    """What an image says of itself."""

    python: str
    distributions: dict[str, Distribution]
    """By normalised name."""
    cuda: str | None
    """That torch was built for."""
    uid: int
    """Of whoever runs in it by default."""
    compilers: tuple[str, ...]
    packages: bool
    """Its list of packages lies in it."""

    @property
    def versions(self) -> dict[str, str]:
        """Every distribution's version."""
        return {name: found.version for name, found in self.distributions.items()}

    @property
    def libraries(self) -> dict[str, str]:
        """Versions of what matters for a number."""
        return {name: self.distributions[name].version for name in THAT_MATTER if name in self.distributions}


class Attempt(Frozen):
    """Something that was tried inside: an import, or loading a native library."""

    name: str
    ok: bool
    error: str = ""
    seconds: float = 0.0


def ask(client: DockerClient, image: str) -> Contents:
    """What is installed in `image`, nothing of it imported; HarnessError where it has no Python that answers."""
    text = engine.run_offline(client, image, argv("installed")).output
    try:
        content = json.loads(text)
        names = {normalised(name): item for name, item in content["distributions"].items()}
        return Contents.model_validate({**content, "distributions": names})
    except (ValueError, KeyError, ValidationError):
        raise HarnessError(f"{image[:19]} does not say what it has installed: {text[:200]!r}") from None


def argv(*arguments: str) -> list[str]:
    """The command that runs our questions in any image with a Python: nothing is mounted."""
    return ["python", "-P", "-c", INSIDE.read_text(encoding="utf-8"), *arguments]


def attempts(client: DockerClient, image: str, kind: str, names: list[str]) -> tuple[Attempt, ...]:
    """Try each of `names` (`kind`: imports or native); after a crash the rest is tried in another container."""
    found: list[Attempt] = []
    left = list(names)
    while left:
        ended = engine.run_offline(client, image, argv(kind, *left), check=False)
        lines = _lines(ended.output)
        found += [Attempt.model_validate(line) for line in lines if "name" in line]
        tried = [line["try"] for line in lines if "try" in line]
        if len(tried) > sum("name" in line for line in lines):
            found.append(Attempt(name=tried[-1], ok=False, error=f"crashed: exit code {ended.status}"))
        elif not tried or ended.status:
            last = (ended.errors.strip().splitlines() or [""])[-1]
            found += [Attempt(name=name, ok=False, error=f"not tried: {last}"[:500]) for name in left[len(tried) :]]
            break
        left = left[len(tried) :]
    return tuple(found)


def _lines(text: str) -> list[dict[str, Any]]:
    lines = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines
