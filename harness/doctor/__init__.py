"""What this machine can do and what to mend: probes look, judges decide, nothing is changed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

from harness import catalog
from harness.doctor import judge, probe
from harness.doctor.facts import Disk, Engines, Finding, Findings, GpuFleet, Host, Network, Slurm
from harness.errors import HarnessError
from harness.schema import EnvironmentName

__all__ = ["Finding", "Findings", "examine"]

TIME_LIMIT_S = 4.0
"""For all probes together: they run at the same time, and one that hangs does not hold up the others."""
ENVIRONMENTS: tuple[EnvironmentName, ...] = ("train", "serve")

T = TypeVar("T")
Differences = Callable[[EnvironmentName], Iterable[str]]
"""How an environment differs from its lock; HarnessError where it is missing. A box's `differences`."""


def examine(runs: Path, differences: Differences, time_limit_s: float = TIME_LIMIT_S) -> Findings:
    """Look at this machine, for runs kept in the folder `runs`; takes at most about `time_limit_s` seconds."""
    seen = ask_all(_probes(runs, differences), time_limit_s)
    return Findings(findings=tuple(_judge(seen, time_limit_s)))


def _probes(runs: Path, differences: Differences) -> dict[str, Callable[[], Any]]:
    """Everything that is asked of the machine, by the topic that a silence is reported under."""
    asked: dict[str, Callable[[], Any]] = {
        "gpus": lambda: probe.gpus(runs),
        "host": probe.host,
        "disk": lambda: probe.disk("run directories", runs),
        "weights": lambda: probe.disk("weights", probe.hub_folder()),
        "containers": probe.engines,
        "slurm": probe.slurm,
        "network": probe.network,
    }
    return asked | {f"environment {name}": _environment(name, differences) for name in ENVIRONMENTS}


def _environment(name: EnvironmentName, differences: Differences) -> Callable[[], Finding]:
    def ask() -> Finding:
        try:
            return judge.environment(name, None, differences(name))
        except HarnessError as error:
            return judge.environment(name, error.message, ())

    return ask


def ask_all(probes: dict[str, Callable[[], Any]], time_limit_s: float) -> dict[str, Any]:
    """Every probe's answer, or the exception that it raised; one that has not answered in time is left out.

    The threads are daemons, so that a probe hung in a driver or on a dead network disk cannot keep the process alive.
    """
    answers: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def ask(topic: str, look: Callable[[], Any]) -> None:
        try:
            answers.put((topic, look()))
        except Exception as error:  # whatever it is, it is shown as a finding
            answers.put((topic, error))

    for topic, look in probes.items():
        threading.Thread(target=ask, args=(topic, look), daemon=True, name=f"doctor {topic}").start()
    deadline, seen = time.monotonic() + time_limit_s, dict[str, Any]()
    while len(seen) < len(probes) and (left := deadline - time.monotonic()) > 0:
        try:
            topic, answer = answers.get(timeout=left)
        except queue.Empty:
            break
        seen[topic] = answer
    return seen


def _judge(seen: dict[str, Any], time_limit_s: float) -> Iterable[Finding]:
    fleet = _known(seen, "gpus", GpuFleet)
    has_gpus = bool(fleet and fleet.gpus)
    judges: dict[str, Callable[[Any], list[Finding]]] = {
        "gpus": judge.gpus,
        "host": lambda host: judge.host(cast(Host, host), has_gpus=has_gpus),
        "disk": lambda disk: [judge.runs_disk(cast(Disk, disk))],
        "weights": lambda disk: judge.variants(catalog.variants(), fleet or GpuFleet(), cast(Disk, disk)),
        **{f"environment {name}": lambda finding: [finding] for name in ENVIRONMENTS},
        "containers": lambda found: judge.engines(cast(Engines, found), has_gpus=has_gpus),
        "slurm": lambda found: [judge.slurm(cast(Slurm, found))],
        "network": lambda found: judge.network(cast(Network, found), has_gpus=has_gpus),
    }
    for topic, decide in judges.items():
        answer = seen.get(topic)
        yield from [_silent(topic, answer, time_limit_s)] if _is_silent(answer) else decide(answer)


def _is_silent(answer: Any) -> bool:
    return answer is None or isinstance(answer, Exception)


def _silent(topic: str, answer: Exception | None, time_limit_s: float) -> Finding:
    """A probe without an answer is a finding: what it looks at is broken, or we are."""
    why = (
        f"did not answer within {time_limit_s:g} s" if answer is None else f"failed: {type(answer).__name__}: {answer}"
    )
    mend = "Ask it by hand (nvidia-smi, df, docker info, sinfo): what hangs there hangs a run too."
    return Finding(topic=topic, status="warn", text=f"The probe {why}.", mend=mend)


def _known(seen: dict[str, Any], topic: str, kind: type[T]) -> T | None:
    answer = seen.get(topic)
    return answer if isinstance(answer, kind) else None
