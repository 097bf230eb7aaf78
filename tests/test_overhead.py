"""The benchmark of what telemetry costs: its order, its arithmetic, and one whole run with invented GPUs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from harness.errors import HarnessError
from harness.summary import spread

ROOT = Path(__file__).resolve().parent.parent
MATRIX = """\
version: 1
name: overhead
train:
  - {variant: tiny-hybrid, device: cuda, method: lora, seq_len: 64, steps: 4, warmup_steps: 1}
"""


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("overhead")


def side(overhead: ModuleType, telemetry: bool, times: list[float], gpus: int | None = None) -> Any:
    return overhead.Side(telemetry=telemetry, step_time_s=spread(times), tokens_per_s=1.0, sampler_core_share=0.004,
                         gpus_sampled=(1 if telemetry else 0) if gpus is None else gpus, job_dir="d")  # fmt: skip


def test_pairs_take_turns_in_which_half_is_first(overhead: ModuleType) -> None:
    ran: list[bool] = []

    def once(telemetry: bool) -> Any:
        ran.append(telemetry)
        return side(overhead, telemetry, [1.0, 1.0])

    pairs = overhead.measure_pairs(once, 3, lambda _: None)
    assert ran == [True, False, False, True, True, False]
    assert [pair.first for pair in pairs] == ["with", "without", "with"]


def test_the_ratio_is_with_over_without(overhead: ModuleType) -> None:
    (pair,) = overhead.measure_pairs(
        lambda on: side(overhead, on, [1.02, 1.02, 5.0] if on else [1.0, 1.0, 1.0]), 1, print
    )
    assert pair.ratio == pytest.approx(1.02)
    assert pair.ratio_of_means == pytest.approx(7.04 / 3)


def test_a_run_without_steady_steps_is_no_measurement(overhead: ModuleType) -> None:
    with pytest.raises(HarnessError, match="no steady step"):
        overhead.measure_pairs(lambda on: side(overhead, on, []), 1, print)


@pytest.mark.parametrize(("telemetry", "gpus"), [(True, 0), (True, 2), (False, 1)])
def test_a_switch_that_did_not_work_is_an_error(overhead: ModuleType, telemetry: bool, gpus: int) -> None:
    with pytest.raises(HarnessError, match="sampled"):
        overhead.checked(side(overhead, telemetry, [1.0], gpus), 1)


def test_pairs_are_run_and_written(tmp_path: Path) -> None:
    """The whole road with two invented GPUs: control plane, supervisor, sampler, records' statistics, table."""
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    python = tmp_path / "python"
    payload = ROOT / "tests/fakes/watched_payload.py"
    python.write_text(f'#!/bin/sh\ncase "$*" in *accelerate*) exec {sys.executable} {payload};; esac\n'
                      f'exec {sys.executable} "$@"\n')  # fmt: skip
    python.chmod(0o755)
    paths = (ROOT / "tests/fakes/fake_pynvml", ROOT)
    env = {**os.environ, "HARNESS_PYTHON": str(python), "PYTHONPATH": os.pathsep.join(map(str, paths))}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    command = [
        sys.executable,
        ROOT / "tools/overhead.py",
        "matrix.yaml",
        "--box",
        "found",
        "--pairs",
        "1",
        "--out",
        "out",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/overhead.json").read_text())
    (pair,) = found["pairs"]
    assert (pair["with_telemetry"]["gpus_sampled"], pair["without"]["gpus_sampled"]) == (1, 0)
    assert (pair["with_telemetry"]["step_time_s"]["n"], found["median_ratio"], found["under_limit"]) == (3, 1.0, True)
    assert found["sampler_core_share"] is not None
    assert found["provenance"]["driver"] == "580.0"
    assert done.stdout == (tmp_path / "out/overhead.md").read_text()
    assert "| 1 | with | 0.50000 | 0.50000 | 3 / 3 | 1.0000 |" in done.stdout
