"""Site files for tests, and the fake cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fakes import fake_slurm

REAL = """\
version: 1
runs: {runs}
partition: batch
nodes: 2
cpus_per_node: 4
cpus_per_device: 1
network: {{GLOO_SOCKET_IFNAME: lo}}
poll_s: 0.5
notice_s: 10
lost_after_s: 4
"""


def write(folder: Path, more: str = "accounting: false\n") -> Path:
    """A site whose shared folder is `folder`; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "site.yaml"
    path.write_text(REAL.format(runs=folder) + more)
    return path


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a fake Slurm first on PATH; returns the folder of its state."""
    programs = fake_slurm.install(folder / "fake-slurm")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", str(folder / "fake-slurm" / "state"))
    return folder / "fake-slurm" / "state"
