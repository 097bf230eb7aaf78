"""Real training and a real server, killed in the middle: what stood stays, nothing is left at work, a run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness import events, store
from harness.backends import processes
from harness.schema import Record

pytestmark = [pytest.mark.payload, pytest.mark.server, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parent.parent.parent
MATRIX = """\
version: 1
name: kills
defaults: {device: cpu, variant: tiny-hybrid, param_dtype: fp32, seq_len: 64, warmup_steps: 1, time_limit: 8m,
           max_model_len: 512, max_num_seqs: 8, enforce_eager: true}
train:
  - {method: lora, steps: 3}
  - {method: lora, strategy: ddp, devices: 2, steps: 400}
serve:
  - load: {concurrency: 2, input_len: 32, output_len: 256, requests: 200}
"""


@dataclass
class Story:
    """A run, and the command lines that worked on it."""

    runs: Path
    matrix: Path
    run: store.Run
    control: subprocess.Popen[str] | None = None

    def start(self) -> None:
        argv = [sys.executable, "-m", "harness", "run", str(self.matrix), "--runs", str(self.runs)]
        with open(self.runs.parent / "control.log", "a") as log:
            self.control = subprocess.Popen(argv, cwd=ROOT, text=True, stdout=log, stderr=log)

    def wait(self, condition: Callable[[], Any], seconds: float = 240) -> Any:
        """What `condition` answers once it is true, while the control plane lives."""
        deadline = time.monotonic() + seconds
        while not (answer := condition()):
            assert self.control is not None
            assert self.control.poll() is None, (self.runs.parent / "control.log").read_text()
            assert time.monotonic() < deadline, (self.runs.parent / "control.log").read_text()
            time.sleep(0.1)
        return answer

    def end(self) -> int:
        assert self.control is not None
        return self.control.wait(300)

    def seen(self, jobs: str, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """Events of that kind in the job directories that match, with these values."""
        found = []
        for folder in self.run.jobs_dir.glob(jobs):
            for path in events.files(str(folder)).values():
                found += [event for _, event in events.read(path) if event and event["kind"] == kind]
        return [event for event in found if fields.items() <= event.items()]

    def record(self, start: str) -> Record | None:
        return next((record for record in self.run.records() if record.case_id.startswith(start)), None)

    def left(self) -> list[str]:
        """Processes that any job noted, or that work in the run directory, and that still live."""
        noted = set()
        for path in self.run.jobs_dir.glob("*/pids.log"):
            lines = [line.split() for line in path.read_text().splitlines()]
            noted |= {(int(line[1]), int(line[2])) for line in lines if line and line[0] == "process"}
        assert noted
        found = []
        for process in processes.everything():
            where = processes.working_directory(process.pid)
            here = bool(where) and Path(str(where)).is_relative_to(self.runs.resolve())
            if not process.ended and (process.key in noted or here):
                found.append(f"{process.name} ({process.pid})")
        return found


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("kills")
    (folder / "kills.yaml").write_text(MATRIX)
    found = Story(folder / "runs", folder / "kills.yaml", store.Run(folder / "runs" / "kills"))
    yield found
    if found.control:
        found.control.kill()
        found.control.wait()


@pytest.fixture(scope="module")
def control_killed(story: Story) -> dict[Path, bytes]:
    """The control plane got a SIGKILL while two ranks trained; the records that stood then."""
    story.start()
    story.wait(lambda: story.seen("*-ddp2-*", "step", step=5))
    before = {path: path.read_bytes() for path in story.run.folder.glob("cases/*/record.json")}
    assert story.control is not None
    story.control.kill()
    story.control.wait()
    return before


@pytest.fixture(scope="module")
def resumed(story: Story, control_killed: dict[Path, bytes]) -> int:
    """The same command again; then a rank and later the server's engine got a SIGKILL. Its exit code."""
    story.start()
    story.wait(lambda: story.seen("*-ddp2-*.2", "step", step=5))
    (begun,) = story.seen("*-ddp2-*.2", "start", rank=1)
    os.kill(begun["pid"], signal.SIGKILL)
    story.wait(lambda: story.seen("serve-*", "phase", name="bench", state="begin"))
    time.sleep(3)
    engines = [process for process in processes.everything() if process.name.startswith("VLLM::EngineCor")]
    mine = [one for one in engines if str(story.runs.resolve()) in str(processes.working_directory(one.pid))]
    assert len(mine) == 1, engines
    os.kill(mine[0].pid, signal.SIGKILL)
    return story.end()


def test_a_killed_control_plane_keeps_its_records_and_its_job_ends(
    story: Story, control_killed: dict[Path, bytes]
) -> None:
    assert [path.parent.name.startswith("train-tiny-hybrid-lora-s64-b1-one") for path in control_killed] == [True]
    deadline = time.monotonic() + 30
    while story.left() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert story.left() == []
    assert story.record("train-tiny-hybrid-lora-s64-b1-ddp2") is None


def test_the_next_run_keeps_what_stood_and_does_the_rest(
    story: Story, control_killed: dict[Path, bytes], resumed: int
) -> None:
    assert resumed == 1
    assert {path: path.read_bytes() for path in control_killed} == control_killed
    assert len(story.run.records()) == 3
    assert sorted(path.name.rpartition(".")[2] for path in story.run.jobs_dir.iterdir()) == ["1", "1", "1", "2"]
    assert story.left() == []


def test_a_killed_rank_is_named(story: Story, resumed: int) -> None:
    record = story.record("train-tiny-hybrid-lora-s64-b1-ddp2")
    assert record is not None
    assert record.status == "failed"
    assert record.last is not None
    assert record.last.diagnosis is not None
    assert record.last.diagnosis.failure_class == "peer_lost"
    assert record.last.diagnosis.culprit is not None
    assert record.last.diagnosis.culprit.rank == 1
    assert max(record.last.observation.ranks[0].steps.step) >= 5  # what it measured until then is kept


def test_a_killed_engine_is_a_failure_and_not_a_number(story: Story, resumed: int) -> None:
    record = story.record("serve-")
    assert record is not None
    assert record.status == "failed"
    assert record.last is not None
    assert record.last.diagnosis is not None
    assert any("EngineDeadError" in line.text for line in record.last.diagnosis.evidence)
    assert record.last.diagnosis.failure_class == "app_exception"
    assert record.last.observation.serve is not None
    assert (record.last.observation.serve.ready_s or 0) > 0
    assert record.last.observation.serve.load is None or record.last.observation.serve.load.failed > 0


def test_the_run_after_that_has_nothing_to_do(story: Story, resumed: int) -> None:
    began = time.monotonic()
    story.start()
    assert story.end() == 1
    assert time.monotonic() - began < 10
