"""Ends and removes a container, and says how it ended: `python container.py NAME`, the clean-up of the docker box.

Standard library and the `docker` command only, since a supervisor runs it. Prints one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import Any

TIMEOUT_S = 25.0
"""Of one question to an Engine; a busy one takes seconds to remove a container."""
LABEL = "harness.run"
"""Label of every container of ours: the run directory that it works for."""
NO_SUCH = ("No such container", "No such object", "is already in progress")


UNREACHED = ("Cannot connect to the Docker daemon", "error during connect", "Is the docker daemon running")


class Refused(Exception):
    """The Engine did not do what was asked."""

    def __init__(self, why: str, *, silent: bool) -> None:
        super().__init__(why)
        self.silent = silent
        """No Engine answered."""


def _docker(*arguments: str) -> str | None:
    """What the Engine answers; `None` where there is no such container (any more)."""
    try:
        done = subprocess.run(
            ["docker", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Refused(f"{type(error).__name__}: {error}", silent=True) from None
    if done.returncode == 0:
        return done.stdout
    if any(words in done.stderr for words in NO_SUCH):
        return None
    why = (done.stderr.strip().splitlines() or ["docker says nothing"])[0]
    raise Refused(why, silent=any(words in done.stderr for words in UNREACHED))


def state(name: str) -> dict[str, Any]:
    """`State` of a container as the Engine has it; empty where there is none."""
    found = _docker("container", "inspect", "--format", "{{json .State}}", name)
    return dict(json.loads(found)) if found else {}


def remove(name: str) -> dict[str, Any]:
    """End and remove a container; what the Engine saw of its end, as fields of an outcome."""
    seen: dict[str, Any] = {}
    try:
        seen["host_oom_killed"] = bool(state(name).get("OOMKilled"))
        _docker("container", "rm", "--force", "--volumes", name)
    except Refused as problem:
        if not problem.silent:
            return seen | {"detail": f"the container {name} could not be removed: {problem}"}
        # Whatever its exit code: that ended the job, and not the job itself.
        return seen | {"interrupted": True, "detail": f"the Docker Engine did not answer at its end: {problem}"}
    return seen


def remove_left(run_dir: str) -> list[str]:
    """Remove containers of a run directory in which nothing is at work; a line for a person each.

    Such as one whose clean-up found no Engine. Asks nothing where the run has no containers.
    """
    with contextlib.suppress(OSError, ValueError), open(os.path.join(run_dir, "run.json"), encoding="utf-8") as file:
        if json.load(file).get("box") == "docker":
            return _remove_labelled(run_dir)
    return []


def _remove_labelled(run_dir: str) -> list[str]:
    try:
        found = _docker("container", "ls", "--all", "--filter", f"label={LABEL}={run_dir}", "--format", "{{.Names}}")
        names = (found or "").split()
        for name in names:
            _docker("container", "rm", "--force", "--volumes", name)
    except Refused as problem:
        return [f"containers that an earlier run may have left could not be removed: {problem}"]
    return [f"removed the container {name}, which an earlier run had left" for name in names]


if __name__ == "__main__":
    print(json.dumps(remove(sys.argv[1])))
