"""How fast the control plane answers; run by hand: .venv/bin/python tests/bench_control_plane.py

Prints the median and the slowest of several runs of each verb, each in a process of its own, and the budget.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POINTS = 10_000

MATRIX = """\
version: 1
name: ten-thousand
defaults: {device: cuda, weights: random, steps: 20}
train:
  - variant: [nano-9b-v2, nano-12b-v2, nano-30b-a3b, nano-30b-a3b-base]
    method: lora
    seq_len: [512, 1024, 2048, 4096, 8192]
    micro_batch: [1, 2, 4, 8, 16]
    grad_accum: [1, 2, 4, 8, 16]
    devices: [2, 4]
    strategy: [ddp, fsdp]
    lora_rank: [8, 16, 32, 64, 128]
    lora_alpha: 16
"""
"""4 x 5 x 5 x 5 x 2 x 2 x 5 points."""


def harness(*arguments: str) -> tuple[float, str]:
    """Seconds that `harness ARGUMENTS` took, and what it printed."""
    began = time.perf_counter()
    argv = [sys.executable, "-P", "-m", "harness", *arguments]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode > 1 or "Traceback" in ended.stderr:  # 1 is doctor's, where it found something bad
        raise SystemExit(f"harness {' '.join(arguments)} ended with {ended.returncode}:\n{ended.stderr}")
    return time.perf_counter() - began, ended.stdout


def measure(title: str, budget_s: float, repeats: int, *arguments: str) -> str:
    """Run a verb several times, print a line, return its last output."""
    took, output = zip(*(harness(*arguments) for _ in range(repeats)), strict=True)
    within = "within" if max(took) <= budget_s else "OVER"
    figures = f"median {statistics.median(took):.2f} s, slowest {max(took):.2f} s of {repeats}"
    print(f"{title}: {figures} ({within} the {budget_s:g} s budget)", flush=True)
    return output[-1]


def main() -> None:
    """Measure each verb that has a budget."""
    print(f"Python {platform.python_version()}, {platform.machine()}, {platform.system()} {platform.release()}")
    measure("harness --help", 0.5, 7, "--help")
    with tempfile.TemporaryDirectory() as folder:
        matrix = Path(folder, "matrix.yaml")
        matrix.write_text(MATRIX)
        plan = json.loads(measure(f"harness plan, {POINTS:,} points", 2.0, 3, "plan", str(matrix), "--json"))
    points = len(plan["cases"]) + len(plan["skips"])
    print(f"  {len(plan['cases']):,} cases + {len(plan['skips']):,} skips = {points:,}")
    if points != POINTS:
        raise SystemExit(f"the matrix has {points} points, not {POINTS}")
    measure("harness doctor", 5.0, 3, "doctor", "--json")


if __name__ == "__main__":
    main()
