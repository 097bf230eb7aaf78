"""A matrix whose jobs are stubs, run in a folder of its own, and what a test asks of the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import stub_box

from harness import boxes, pipeline, store
from harness.backends import processes
from harness.schema import Record
from harness.session import Options

MATRIX = """\
version: 1
name: small
defaults: {device: cpu, variant: tiny-hybrid, steps: 3, warmup_steps: 1, max_model_len: 256}
"""
FOUR = MATRIX + "train:\n  - {method: [lora, full], seq_len: [64, 128]}\n"
MIXED = (
    FOUR
    + """\
  - {method: lora, seq_len: 64, strategy: ddp, devices: [1, 2]}
serve:
  - load:
      - {concurrency: 1, input_len: 8, output_len: 8, requests: 2}
      - {concurrency: 4, input_len: 8, output_len: 8, requests: 8}
chain:
  - train: {method: lora, seq_len: 64}
    serve: {adapter: adapter, load: {concurrency: 1, input_len: 8, output_len: 8, requests: 2}}
"""
)
ONE_GPU = MATRIX.replace("device: cpu", "device: cuda") + "train: [{method: lora, seq_len: [64, 128, 256, 512]}]\n"
FULL = "*-full-*"


class Bench:
    """A matrix, its runs, and a box of stub jobs."""

    def __init__(self, folder: Path, box: stub_box.StubBox) -> None:
        self.folder, self.box = folder, box
        self.matrix, self.runs = folder / "small.yaml", folder / "runs"
        self.directory = store.Run(self.runs / "small")

    def run(self, text: str = FOUR, watch: Callable[[Any], None] = lambda _: None, **options: Any) -> pipeline.Result:
        self.matrix.write_text(text)
        return pipeline.run(self.matrix, Options(runs=self.runs, **({"box": "stub"} | options)), watch)

    def attempts(self) -> Counter[str]:
        """How often each job was started."""
        return Counter(path.name.rpartition(".")[0] for path in self.directory.jobs_dir.glob("*"))

    def stamps(self) -> dict[Path, int]:
        """When each record was written last."""
        return {path: path.stat().st_mtime_ns for path in self.directory.folder.glob("cases/*/record.json")}

    def uses(self) -> list[tuple[float, float, str]]:
        """Begin, end and devices of each job."""
        found = []
        for path in self.directory.jobs_dir.glob("*/used.json"):
            used = json.loads(path.read_text())
            outcome = json.loads((path.parent / "outcome.json").read_text())
            found.append((used["begin"], outcome["end"], used["devices"]))
        return sorted(found)

    def working(self) -> list[str]:
        """Living processes that work in the run directory."""
        found = []
        for process in processes.everything():
            where = processes.working_directory(process.pid)
            if where and Path(where).is_relative_to(self.folder.resolve()) and not process.ended:
                found.append(process.name)
        return found


def stubbed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs in `folder` whose box `stub` starts stubs, looked after without delay."""
    box = stub_box.StubBox()
    monkeypatch.setitem(boxes.REGISTRY, "stub", lambda _: box)
    monkeypatch.setattr(pipeline, "POLL_S", 0.02)
    return Bench(folder, box)


def status(records: tuple[Record, ...] | list[Record]) -> Counter[str]:
    return Counter(record.status for record in records)


def failure(record: Record) -> str | None:
    return record.last.diagnosis.failure_class if record.last and record.last.diagnosis else None
