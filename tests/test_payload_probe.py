"""The probe's payload as it runs: real ranks over gloo in the training environment."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import events, launch, observe, pipeline, triage
from harness.schema import Observation, Outcome, ProbeCase
from harness.session import Options
from harness.summary.probes import summarize_probe

pytestmark = pytest.mark.payload

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Ran:
    """What is left of one probe."""

    case: ProbeCase
    outcome: Outcome
    seen: Observation
    log: str


class Runner:
    """Runs probes in the training environment, as the launch module says."""

    def __init__(self, python: Path, folder: Path) -> None:
        self._python, self._folder = python, folder

    def run(self, name: str, during: Callable[[Path], None] = lambda folder: None, **fields: Any) -> Ran:
        case = ProbeCase(**({"device": "cpu", "sizes_bytes": (1024, 2**20), "iterations": 5, "stall_s": 30.0} | fields))
        (job,) = launch.jobs((case,), 1)
        folder = self._folder / name
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(job.payload))
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **job.env}
        began = time.time()
        with (folder / "stdout.log").open("wb") as output:
            job_ = subprocess.Popen([str(self._python), *job.argv[1:]], cwd=folder, env=env, stdout=output,
                                    stderr=subprocess.STDOUT)  # fmt: skip
            during(folder)
            code = job_.wait(timeout=120)
        outcome = Outcome(exit_code=code, start=began, end=time.time())
        return Ran(case, outcome, observe.observe(case, [folder]), observe.log_text([folder]))


@pytest.fixture(scope="module")
def runner(environments: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(environments / "train/bin/python", tmp_path_factory.mktemp("probe"))


def test_two_ranks_reduce_and_say_what_they_used(runner: Runner) -> None:
    ran = runner.run("plain", interface="lo")
    assert triage.diagnose(ran.case, [ran.outcome], ran.seen, ran.log) is None
    assert ran.seen.probe is not None
    assert ran.seen.probe.proof["interfaces"] == ["lo"]
    assert ran.seen.probe.backend == "gloo"
    assert all(check.ok for check in ran.seen.probe.checks)
    assert {check.name for check in ran.seen.probe.checks} >= {
        "all_reduce_sum", "broadcast_from_0", "broadcast_from_1", "all_reduce_sum_1048576"}  # fmt: skip
    found = summarize_probe(ran.case, ran.seen.probe)
    assert [size.n for size in found.sizes] == [5, 5]
    assert found.bus_bytes_per_s is not None
    assert 1e6 < found.bus_bytes_per_s < 1e12
    assert ran.outcome.end - ran.outcome.start < 60


def test_an_interface_that_is_not_there_fails_as_the_networks_fault(runner: Runner) -> None:
    ran = runner.run("no-interface", interface="nosuch0")
    diagnosis = triage.diagnose(ran.case, [ran.outcome], ran.seen, ran.log)
    assert diagnosis is not None
    assert diagnosis.failure_class == "nccl_bootstrap_net", diagnosis
    assert "nosuch0" in "".join(line.text for line in diagnosis.evidence)


def test_debug_makes_the_libraries_say_what_they_do(runner: Runner) -> None:
    ran = runner.run("debug", debug=True, devices=3)
    assert triage.diagnose(ran.case, [ran.outcome], ran.seen, ran.log) is None
    assert ran.seen.probe is not None
    assert ran.seen.probe.proof["debug_level"] == "DETAIL"
    assert "Running collective" in ran.log
    assert {check.expected for check in ran.seen.probe.checks if check.name == "all_reduce_sum_1024"} == {6.0}


COMPARE = """
import sys, torch
from harness.events import EventLog
from harness.payload.journal import Journal
from harness.payload.probe import compare
journal = Journal(EventLog(sys.argv[1], 0), 0)
right = torch.arange(8, dtype=torch.float32)
wrong = right.clone(); wrong[5] = 7.5
compare("same", right, right.clone(), journal)
compare("other", wrong, right, journal)
wrong[2] = float("nan")
compare("nan", wrong, right, journal)
"""


def test_the_element_that_is_furthest_off_is_stated(environments: Path, tmp_path: Path) -> None:
    command = [str(environments / "train/bin/python"), "-c", COMPARE, str(tmp_path)]
    subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, check=True, timeout=120)
    seen = observe.observe(ProbeCase(device="cpu"), [tmp_path])
    assert seen.probe is not None
    assert [(one.name, one.ok, one.found, one.expected) for one in seen.probe.checks] == [
        ("same", True, 0.0, 0.0), ("other", False, 7.5, 5.0), ("nan", False, None, 2.0)]  # fmt: skip


def kill_rank_1_as_it_measures(folder: Path) -> None:
    path, deadline = Path(events.file_of(str(folder), 1)), time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = [event for _, event in events.read(str(path)) if event] if path.exists() else []
        if any(event["kind"] == "collective" for event in lines):
            os.kill(next(event["pid"] for event in lines if event["kind"] == "start"), signal.SIGKILL)
            return
        time.sleep(0.05)
    raise AssertionError("rank 1 never measured")


def test_a_rank_that_dies_is_named(runner: Runner) -> None:
    ran = runner.run("killed", kill_rank_1_as_it_measures, sizes_bytes=(1024, 2**26), iterations=500)
    diagnosis = triage.diagnose(ran.case, [ran.outcome], ran.seen, ran.log)
    assert diagnosis is not None
    assert (diagnosis.failure_class, diagnosis.phase) == ("peer_lost", "measure")
    assert diagnosis.culprit is not None
    assert diagnosis.culprit.rank == 1


LADDER = """
version: 1
name: ladder
defaults: {device: cpu}
probe:
  - {interface: nosuch0, sizes: [1KiB], iterations: 3, ladder: nccl, stall: 30s}
train:
  - {variant: tiny-hybrid, method: full, seq_len: 64, devices: 2, strategy: ddp, steps: 2, warmup_steps: 1,
     ladder: nccl, stall: 1s}
"""


def test_the_ladder_finds_out_what_two_real_failures_are_not(environments: Path, tmp_path: Path) -> None:
    """An interface that is not there, and training that gives no sign of life for a second while it imports."""
    path = tmp_path / "ladder.yaml"
    path.write_text(LADDER)
    result = pipeline.run(path, Options(runs=tmp_path / "runs"))
    first = {record.case.kind: record for record in result.records if record.parent is None}
    said = {kind: record.last.diagnosis for kind, record in first.items() if record.last}
    assert {kind: one.failure_class for kind, one in said.items() if one} == {
        "probe": "nccl_bootstrap_net", "train": "stalled"}  # fmt: skip
    assert said["probe"] is not None
    assert "With the interface pinned to lo the all-reduce of 2 ranks completes" in said["probe"].showed
    assert said["train"] is not None
    assert "Without the model the all-reduce of 2 ranks completes" in said["train"].showed
    added = [record for record in result.records if record.parent]
    assert sorted(record.rung.name for record in added if record.rung) == ["interface", "nccl_debug", "nccl_debug"]
    assert [record.status for record in added if record.rung and record.rung.name == "interface"] == ["measured"]
    again = pipeline.run(path, Options(runs=tmp_path / "runs"))
    assert [record.finished_at for record in again.records] == [record.finished_at for record in result.records]
