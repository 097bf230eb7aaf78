"""Makes the faults, one after the other, shows their logs to triage, and compares what it says with what was done."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
from harness import __version__, backends, boxes, host, store, triage
from harness.drill import score
from harness.drill.faults import Debug, Fault, chosen, job_of, settings
from harness.drill.score import Drilled, Truth
from harness.errors import HarnessError
from harness.schema import DeviceType, Environment, LogVerdict, Ticket

POLL_S = 0.2
SEEN = "seen"
PACKAGE = Path(harness.__file__).parent


@dataclass(frozen=True)
class Options:
    """What to drill, where, and with which libraries."""

    out: Path
    only: str | None = None
    device: DeviceType = "cpu"
    gpus: int | None = None
    debug: Debug = "both"
    box: str = "venv"
    at_once: int = 1


Watch = Callable[[Drilled, int, int], None]
"""Is told each drill as it ends, its number in the order of ending, and how many there are."""


def run(options: Options, watch: Watch = lambda *_: None) -> list[Drilled]:
    """Every chosen drill; HarnessError where none can begin. The scorecard stands in `out` after each."""
    faults = chosen(options.only, options.device)
    if options.out.exists() and any(options.out.iterdir()):
        raise HarnessError(f"{options.out} is not empty", "name a folder of its own with --out")
    options.out.mkdir(parents=True, exist_ok=True)
    directory = store.Run(options.out.resolve())
    directory.stage_payload(PACKAGE)
    drills = _Drills(options, directory.payload_root)
    todo = [(fault, debug) for fault in faults for debug in settings(options.debug)]
    results: list[Drilled] = []
    made = _made(options)
    for result in drills.all(todo, options.at_once):
        results.append(result)
        watch(result, len(results), len(todo))
        _keep(options.out, made, results)
    return sorted(results, key=lambda one: ([fault.name for fault in faults].index(one.name), one.debug))


def _made(options: Options) -> dict[str, object]:
    """What a scorecard says of itself."""
    return {
        "harness": __version__,
        "commit": host.commit(PACKAGE.parent),
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": options.device,
        "box": options.box,
        "at_once": options.at_once,
    }


def _keep(out: Path, made: dict[str, object], results: Sequence[Drilled]) -> None:
    drills = [one.model_dump(mode="json") for one in results]
    card = {"made": made, "summary": score.summary(results), "drills": drills}
    (out / "scorecard.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def visible_gpus() -> int:
    """GPUs that a program started here can use."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return len([one for one in shown.split(",") if one.strip()])
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
        return said.stdout.count("GPU ") if said.returncode == 0 else 0
    return 0


@dataclass(frozen=True)
class _Running:
    """A drill at work."""

    fault: Fault
    truth: Truth
    folder: Path
    ticket: Ticket
    began: float


class _Drills:
    """What the drills of one call share."""

    def __init__(self, options: Options, payload_root: Path) -> None:
        self._out = options.out.resolve()
        self._payload_root = payload_root
        self._box = boxes.get(options.box)
        self._backend = backends.get("local")
        self._gpus = 0 if options.device == "cpu" else visible_gpus() if options.gpus is None else options.gpus
        self._environments: dict[str, Environment] = {}

    def all(self, todo: Sequence[tuple[Fault, bool]], at_once: int) -> Iterator[Drilled]:
        """Each drill's result as it ends; those that need the device for themselves come last, one by one."""
        waiting = deque(sorted(todo, key=lambda one: one[0].alone))
        running: list[_Running] = []
        try:
            while waiting or running:
                if waiting and self._may_start(waiting[0][0], running, at_once):
                    started = self._start(*waiting.popleft())
                    if isinstance(started, Drilled):
                        yield started
                    else:
                        running.append(started)
                    continue
                time.sleep(POLL_S)
                ended = self._backend.poll([one.ticket for one in running])
                for one in [one for one in running if one.ticket.job_id in ended]:
                    running.remove(one)
                    yield self._judged(one)
        finally:
            self._end(running)

    @staticmethod
    def _may_start(fault: Fault, running: Sequence[_Running], at_once: int) -> bool:
        return not running or (len(running) < at_once and not fault.alone)

    def _start(self, fault: Fault, debug: bool) -> _Running | Drilled:
        truth = score.truth_of(fault, debug)
        if (reason := self._impossible(fault)) is not None:
            return _result(truth, "skipped", reason)
        job = job_of(fault, debug)
        folder = self._out / job.id
        work = folder / "job"
        work.mkdir(parents=True)
        ticket = self._backend.submit(job, self._box.wrap(job, work, self._payload_root), work)
        return _Running(fault, truth, folder, ticket, time.monotonic())

    def _end(self, running: Sequence[_Running]) -> None:
        """End what is at work, with all that it started."""
        tickets = [one.ticket for one in running]
        for ticket in tickets:
            self._backend.cancel(ticket)
        while len(self._backend.poll(tickets)) < len(tickets):
            time.sleep(POLL_S)

    def _impossible(self, fault: Fault) -> str | None:
        """Why this machine cannot make it, as far as that is known before."""
        if fault.device == "cuda" and self._gpus < fault.gpus:
            return f"needs {'a GPU' if fault.gpus == 1 else f'{fault.gpus} GPUs'}, {self._gpus} can be seen"
        try:
            if fault.environment not in self._environments:
                self._environments[fault.environment] = self._box.environment(fault.environment)
        except HarnessError as error:
            return error.message
        return None

    def _judged(self, one: _Running) -> Drilled:
        fault, truth, folder = one.fault, one.truth, one.folder
        self._backend.collect(one.ticket)
        seconds = round(time.monotonic() - one.began, 1)
        if (folder / "job" / SEEN).exists():
            (folder / "job" / SEEN).rename(folder / SEEN)
        ended = _ended(folder / "job")
        environment = self._environments[fault.environment]
        truth = truth.model_copy(update={
            "made_by": f"harness {__version__} drill, box {environment.box}",
            "when": time.strftime("%Y-%m-%d", time.gmtime()),
            "python": environment.python,
            "libraries": environment.libraries,
            "exit_code": ended.get("exit_code"),
            "seconds": ended.get("seconds"),
        })  # fmt: skip
        (folder / "truth.json").write_text(truth.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if reason := ended.get("skipped"):
            return _result(truth, "skipped", str(reason), seconds, folder)
        if reason := _not_injected(truth, ended):
            return _result(truth, "not injected", reason, seconds, folder)
        return compare(truth, folder, seconds)


def compare(truth: Truth, folder: Path, seconds: float = 0.0) -> Drilled:
    """What triage says of the logs in `folder`, held against the truth."""
    try:
        verdict = triage.triage([folder / SEEN])
    except HarnessError as error:
        return _result(truth, "not injected", f"no log was left: {error.message}", seconds, folder)
    (folder / "verdict.json").write_text(json.dumps(triage.as_json(verdict), indent=1) + "\n", encoding="utf-8")
    wrong = score.mistakes(truth, verdict)
    return _result(truth, "wrong" if wrong else "right", "; ".join(wrong), seconds, folder, verdict)


def _not_injected(truth: Truth, ended: dict[str, object]) -> str:
    """Why the fault cannot count as made; empty where it can."""
    if not ended:
        return "the stage left no word; its stderr.log says why"
    if reason := ended.get("undone"):
        return str(reason)
    if truth.failure_class == "no_failure" and ended["exit_code"] != 0:
        return f"the healthy run ended with exit code {ended['exit_code']}"
    if truth.failure_class not in ("no_failure", "nan_loss") and ended["exit_code"] == 0:
        return "the program ended as if nothing were wrong"
    return ""


def _ended(job: Path) -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, object] = json.loads((job / "ended.json").read_text(encoding="utf-8"))
        return found
    return {}


def _result(truth: Truth, status: score.Status, reason: str, seconds: float = 0.0, folder: Path | None = None,
            verdict: LogVerdict | None = None) -> Drilled:  # fmt: skip
    return Drilled(
        name=truth.fault,
        debug=truth.debug,
        status=status,
        reason=reason,
        expected_class=truth.shown_class,
        expected_culprit=truth.shown_culprit,
        why=truth.why,
        found_class=verdict.failure_class if verdict else "",
        found_culprit=verdict.culprit if verdict else None,
        class_status=verdict.class_status if verdict else "",
        seconds=seconds,
        folder=folder.name if folder else "",
    )
