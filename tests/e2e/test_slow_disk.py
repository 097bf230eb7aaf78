"""Real ranks whose checkpoints go to a file system that hangs climb to a local disk, and the verdict says so."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import store
from harness.payload.drills import stage

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.payload

MATRIX = """\
version: 1
name: slow
defaults: {device: cpu, variant: tiny-hybrid, method: lora, seq_len: 64, steps: 2, warmup_steps: 1}
train:
  - {strategy: ddp, devices: 2, stall: 2m, ladder: nccl}
"""
HANGS_S = 1800
"""Far beyond the stall limit, which is as long as imports may take on a busy host."""


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than `tmp_path`."""
    if os.geteuid() != 0 or not stage.namespace():
        pytest.skip("a file system that only one program sees as slow needs root")
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this host has no second file system to write to")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def run(matrix: Path, slow: Path, scratch: Path) -> subprocess.CompletedProcess[str]:
    """`harness run` into a run directory whose checkpoints cannot be opened in time."""
    disk = (sys.executable, str(ROOT / "tests/fakes/slow_disk.py"), str(slow), str(HANGS_S))
    argv = (sys.executable, "-m", "harness", "run", str(matrix), "--runs", str(slow), "--scratch", str(scratch))
    return subprocess.run(["unshare", "--mount", *disk, *argv], cwd=ROOT, capture_output=True, text=True, timeout=900,
                          check=False)  # fmt: skip


def test_checkpoints_on_a_file_system_that_hangs_are_told_from_the_network(tmp_path: Path, memory: Path) -> None:
    matrix, scratch = tmp_path / "slow.yaml", tmp_path / "scratch"
    matrix.write_text(MATRIX)
    scratch.mkdir()
    ended = run(matrix, memory, scratch)
    assert ended.returncode == 1, ended.stderr
    first, probe, again = store.Run(memory / "slow").records()
    diagnosis = first.last and first.last.diagnosis
    assert diagnosis
    assert first.status == "failed"
    assert [one.rung.name for one in (probe, again) if one.rung] == ["nccl_debug", "local_checkpoints"]
    assert (probe.status, again.status) == ("measured", "measured")
    assert (probe.parent, again.parent) == (first.case_id, probe.case_id)
    assert diagnosis.showed == (
        "Without the model the all-reduce of 2 ranks completes. "
        "With checkpoints on a local disk the case completes: the storage path is suspect."
    )
    assert "checkpoints: local" in diagnosis.next_step
    assert list(scratch.iterdir()) == []
