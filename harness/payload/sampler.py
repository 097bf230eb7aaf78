"""The sidecar that samples this node's GPUs while a job runs, and how its parent starts and ends it.

`python -m harness.payload.sampler DEVICES NODE ROOT PARENT` in the job's directory appends to
`gpu.samples.node<N>.jsonl`, one JSON object a line, until its standard input closes or its parent is gone:

    gpus     node, interval_s, columns (nvml.FAST), slow_columns (nvml.SLOW), cpus (of the parent), gpus [what does not
             change of each: nvml.Card.describe]; the first line
    sample   t (Unix seconds), gpus: a row per GPU in the order of CUDA's ordinals, null once it is lost, and null in
             it what is not asked at every tick (nvml.TICKS); slow: {ordinal: row}, each GPU once a second
    process  gpu, pid, name, own (a descendant of ROOT; null where its pid is not of this namespace)
    cost     cpu_s, wall_s since the first sample: what sampling takes; interval_s; ms: {NVML call: mean processor time}
    note     text: a GPU that throttles, vanishes, or is shared; no telemetry, and why

It asks ten times a second, and less often where that takes more than `COST_LIMIT` of a core per GPU; a note says so.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from harness.payload import nvml

FILE_NAME = "gpu.samples.node{node}.jsonl"
SWITCH = "HARNESS_TELEMETRY"
"""`off` in a job's environment: no sampler. Only the measurement of its own cost sets it."""
INTERVAL_S = 0.1
SLOW_S = 1.0
COST_EVERY_S = 5.0
COST_LIMIT = 0.05
"""A tick takes 4 to 5 ms per GPU on Hopper (seen, driver 580): ten a second stay under it."""
END_S = 2.0
THROTTLES = {0x4: "software power cap", 0x8: "hardware slowdown", 0x20: "software thermal slowdown",
             0x40: "hardware thermal slowdown", 0x80: "hardware power brake"}  # fmt: skip
"""`nvmlClocksEventReason*` (nvml.h) that hold a GPU back while it works."""
_PR_SET_PDEATHSIG = 1


# ---------------------------------------------------------------- the parent's side


def start(devices: int, node: int, root: int) -> subprocess.Popen[bytes] | None:
    """Start the sidecar for the first `devices` GPUs of this process; None where it is switched off.

    `root`: the process whose descendants are the job's own.
    """
    if os.environ.get(SWITCH) == "off":
        return None
    arguments = [str(number) for number in (devices, node, root, os.getpid())]
    return subprocess.Popen([sys.executable, "-m", "harness.payload.sampler", *arguments], stdin=subprocess.PIPE,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


def stop(sidecar: subprocess.Popen[bytes] | None) -> None:
    """End it and wait for it."""
    if sidecar is None or sidecar.stdin is None:
        return
    sidecar.stdin.close()
    try:
        sidecar.wait(timeout=END_S)
    except subprocess.TimeoutExpired:
        sidecar.kill()
        sidecar.wait(timeout=END_S)


# ---------------------------------------------------------------- the sidecar


def main(arguments: list[str]) -> int:
    """Sample until the parent closes our standard input; 0, or 1 where there is nothing to sample."""
    devices, node, root, parent = (int(argument) for argument in arguments)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return 0
    with Path(FILE_NAME.format(node=node)).open("a", encoding="utf-8") as file:
        log = Log(file)
        try:
            import pynvml

            pynvml.nvmlInit()
            found = nvml.cards(pynvml, devices)
            _say_what_there_is(log, pynvml, found, devices, node, parent)
        except Exception as error:  # whatever is wrong with the driver, the case itself goes on
            log.note(f"No GPU telemetry: {type(error).__name__}: {error}")
            return 1
        Sampling(log, found, root).run()
    return 0


class Log:
    """Appends lines, each on its way to the disk at once."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, kind: str, **fields: Any) -> None:
        """One line."""
        self._file.write(json.dumps({"kind": kind, **fields}, separators=(",", ":")) + "\n")
        self._file.flush()

    def note(self, text: str) -> None:
        """A sentence for a person."""
        self.write("note", t=_now(), text=text)


def _now() -> float:
    return round(time.time(), 3)


def _say_what_there_is(log: Log, pynvml: Any, found: list[nvml.Card], devices: int, node: int, parent: int) -> None:
    """The first line, and what a person must know of these GPUs before the first sample."""
    described = [card.describe(found) for card in found]
    log.write("gpus", t=_now(), node=node, interval_s=INTERVAL_S, columns=nvml.FAST, slow_columns=nvml.SLOW,
              cpus=len(os.sched_getaffinity(parent)), gpus=described)  # fmt: skip
    if len(found) < devices:
        log.note(f"Telemetry sees {len(found)} of {devices} GPUs (CUDA_VISIBLE_DEVICES="
                 f"{os.environ.get('CUDA_VISIBLE_DEVICES')}).")  # fmt: skip
    if doubt := nvml.order_doubt(pynvml):
        log.note(doubt)


class Sampling:
    """The loop: a line at each tick, one GPU's slow values at a time, never more than its share of a core."""

    def __init__(self, log: Log, cards: list[nvml.Card], root: int) -> None:
        self._log, self._cards, self._root = log, cards, root
        self._alive = {card.ordinal: card for card in cards}
        self._slow_due = dict.fromkeys(self._alive, 0.0)
        self._processes: set[tuple[int, int]] = set()
        self._throttles: set[tuple[int, int]] = set()
        self._interval_s = INTERVAL_S
        self._ticks = 0
        self._cost = Cost()

    def run(self) -> None:
        """Sample until standard input closes or no GPU is left."""
        due = time.monotonic()
        while self._alive:
            self._tick()
            self._mind_the_cost()
            now = time.monotonic()
            due = max(due + self._interval_s, now)
            if select.select([sys.stdin], [], [], due - now)[0]:
                break
        self._say_the_cost()

    def _tick(self) -> None:
        questions = {name for name, ticks in nvml.TICKS.items() if self._ticks % ticks == 0}
        self._ticks += 1
        rows = [self._ask(card, partial(card.fast, questions)) for card in self._cards]
        line: dict[str, Any] = {"t": _now(), "gpus": rows}
        now = time.monotonic()
        card = min(self._alive.values(), key=lambda one: self._slow_due[one.ordinal], default=None)
        if card and self._slow_due[card.ordinal] <= now:
            self._slow_due[card.ordinal] = max(self._slow_due[card.ordinal] + SLOW_S, now + SLOW_S / 2)
            if row := self._ask(card, card.slow):
                line["slow"] = {str(card.ordinal): row}
        self._log.write("sample", **line)
        for ordinal, row in line.get("slow", {}).items():
            self._remark(self._cards[int(ordinal)], row)

    def _ask(self, card: nvml.Card, question: Any) -> Any:
        """The answer of a GPU that is there; a note when it vanishes, None from then on."""
        if card.ordinal not in self._alive:
            return None
        try:
            return question()
        except nvml.Lost as lost:
            del self._alive[card.ordinal]
            self._log.note(f"{card.name()} is lost: {lost}.")
            return None

    def _remark(self, card: nvml.Card, row: list[Any]) -> None:
        """What in a slow row is new and worth a line."""
        _, bits, _, _, processes = row
        for bit, reason in THROTTLES.items():
            if (bits or 0) & bit and (card.ordinal, bit) not in self._throttles:
                self._throttles.add((card.ordinal, bit))
                self._log.note(f"{card.name()} throttles: {reason}.")
        for pid, used_bytes in processes:
            if (card.ordinal, pid) not in self._processes:
                self._processes.add((card.ordinal, pid))
                self._introduce(card, pid, used_bytes)

    def _introduce(self, card: nvml.Card, pid: int, used_bytes: int | None) -> None:
        name, own = command_name(pid), descends(pid, self._root)
        self._log.write("process", t=_now(), gpu=card.ordinal, pid=pid, name=name, own=own)
        if own is False:
            held = f"{used_bytes / 2**30:.1f} GiB" if used_bytes is not None else "an unknown amount of memory"
            self._log.note(f"{card.name()} is shared: process {pid} ({name}), not of this job, holds {held}.")

    def _mind_the_cost(self) -> None:
        """Every few seconds: stretch the interval by as much as the cost is above its limit, or back."""
        share = self._cost.look()
        if share is None:
            return
        self._say_the_cost()
        limit = COST_LIMIT * len(self._cards)
        if share > limit and self._interval_s == INTERVAL_S:
            self._log.note(f"Ten samples a second took {share:.1%} of a core: the sampler asks less often, "
                           f"so that it stays near {limit:.0%}.")  # fmt: skip
        self._interval_s = min(max(self._interval_s * share / limit, INTERVAL_S), SLOW_S)

    def _say_the_cost(self) -> None:
        names = {name for card in self._cards for name in card.calls}
        spent = {name: sum(card.cpu_s[name] for card in self._cards) / sum(card.calls[name] for card in self._cards)
                 for name in sorted(names)}  # fmt: skip
        dear = {name.removeprefix("nvmlDeviceGet"): round(1e3 * mean_s, 3) for name, mean_s in spent.items()}
        self._log.write("cost", **self._cost.so_far(), interval_s=round(self._interval_s, 3), ms=dear)


class Cost:
    """Processor time of this process since the first sample."""

    def __init__(self) -> None:
        self._cpu = self._cpu_seen = time.process_time()
        self._wall = self._wall_seen = time.monotonic()

    def look(self) -> float | None:
        """Share of a core since the last look, every `COST_EVERY_S`; else None."""
        cpu, wall = time.process_time(), time.monotonic()
        if wall - self._wall_seen < COST_EVERY_S:
            return None
        share = (cpu - self._cpu_seen) / (wall - self._wall_seen)
        self._cpu_seen, self._wall_seen = cpu, wall
        return share

    def so_far(self) -> dict[str, float]:
        """Fields of a `cost` line."""
        return {"t": _now(), "cpu_s": round(time.process_time() - self._cpu, 4),
                "wall_s": round(time.monotonic() - self._wall, 3)}  # fmt: skip


def command_name(pid: int) -> str | None:
    """The name of a process, None where it is not to be seen."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def descends(pid: int, root: int) -> bool | None:
    """Is it `root` or below it? None where its own entry in /proc cannot be read."""
    seen: set[int] = set()
    while pid not in seen:
        if pid == root:
            return True
        seen.add(pid)
        above = _parent(pid)
        if above is None:
            return None if len(seen) == 1 else False
        pid = above
    return False


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
