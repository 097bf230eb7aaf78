"""What a job has at work outside its supervisor's process tree, such as a container. Standard library only."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from harness.backends import processes

MARK = "HARNESS_JOB"
"""Environment variable with a job's mark, by which its processes are known wherever they run on this host."""
TIMEOUT_S = 60.0
GRACE_S = 1.0
FACTS = frozenset({"host_oom_killed", "interrupted"})
"""What the clean-up of a job may say of its end."""


def marked(mark: str) -> list[processes.Process]:
    """Living processes that were started with the mark, and all that descend from them."""
    entry = f"{MARK}={mark}".encode()
    every = processes.everything()
    roots = [process.pid for process in every if entry in processes.environment(process.pid)]
    return [process for process in processes.with_descendants(roots, every) if not process.ended]


def clean_up(order: dict[str, Any]) -> dict[str, Any]:
    """Run an order's `cleanup`, then end whatever process of the job is left; what it says of the end.

    `order` is the content of a job's `supervisor.json`. Empty where the job has nothing to clean up; `detail` says what
    went wrong.
    """
    if not order.get("cleanup"):
        return {}
    said = _run(order["cleanup"], order["env"])
    left = processes.end(lambda: marked(order["mark"]), GRACE_S)
    if left:
        stuck = ", ".join(str(process.pid) for process in left)
        said["detail"] = "; ".join(filter(None, (said.get("detail"), f"could not be ended: {stuck}")))
    return said


def _run(argv: list[str], env: dict[str, str]) -> dict[str, Any]:
    try:
        answer = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S)
        said = json.loads(answer.stdout.decode(errors="replace").strip() or "{}")
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return {"detail": f"cleaning up failed: {type(error).__name__}: {error}"}
    facts = {name: said[name] for name in FACTS if said.get(name) is True} if isinstance(said, dict) else {}
    return facts | ({"detail": str(said["detail"])} if isinstance(said, dict) and said.get("detail") else {})
