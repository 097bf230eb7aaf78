"""What a run on Slurm costs the control plane: scheduler calls a second, memory, and the delay from end to record.

    eval "$(tools/slurm start)"; PYTHONPATH=. python tests/bench_slurm.py [--cases 1000] [--seconds 3600] [--at-once 64]

Cases with a stub payload on the real controller of two nodes with 4 processors each. The goal is 1,000 cases over an
hour. A shorter run of the same cases costs more calls a second, never fewer: a look asks for all jobs at once and comes
every 5 s, and each submission is one call more. `--stop-after` ends a run early and cancels what is left of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
from fakes import slurm_sites, stub_box

from harness import boxes, matrix, pipeline, session, store
from harness.backends.slurm import Slurm

SLOTS = 8
"""Processors of the two nodes."""


def text(cases: int) -> str:
    rates = ", ".join(f"{1e-5 * (index + 1):.6f}" for index in range(-(-cases // 2)))
    return f"""\
version: 1
name: bench
defaults: {{device: cpu, variant: tiny-hybrid, steps: 3, warmup_steps: 1, seq_len: 64}}
train:
  - {{method: [lora, full], learning_rate: [{rates}]}}
"""


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--cases", type=int, default=1000)
    asked.add_argument("--seconds", type=float, default=3600.0)
    asked.add_argument("--at-once", type=int, default=64)
    asked.add_argument("--poll", type=float, default=5.0)
    asked.add_argument("--stop-after", type=float, default=float("inf"))
    options = asked.parse_args()
    opened: list[Slurm] = []
    make = Slurm.__init__

    def remember(self: Slurm, *rest: object) -> None:
        make(self, *rest)  # type: ignore[arg-type]
        opened.append(self)

    Slurm.__init__ = remember  # type: ignore[method-assign]
    step_s = max(0.0, options.seconds * SLOTS / options.cases / 3 - 0.5)
    boxes.REGISTRY["stub"] = lambda _: stub_box.StubBox([("*", {"step_s": step_s})])
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        site = slurm_sites.write(Path(folder), f"accounting: false\nmax_queued: {options.at_once}\n")
        site.write_text(site.read_text().replace("poll_s: 0.5", f"poll_s: {options.poll}"))
        path = Path(folder) / "bench.yaml"
        path.write_text(text(options.cases))
        planned = len(matrix.load(path).cases)
        run = store.Run(Path(folder) / "bench")
        peak, began = 0, time.monotonic()

        def watch(_: pipeline.Progress) -> None:
            nonlocal peak
            peak = max(peak, psutil.Process().memory_info().rss)
            if time.monotonic() - began > options.stop_after:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            pipeline.run(path, session.Options(runs=Path(folder), backend=f"slurm:{site}", box="stub"), watch)
        took, client, busy = time.monotonic() - began, opened[-1].client, sum(psutil.Process().cpu_times()[:2])
        calls, by_program = client.calls, dict(client.by_program)
        if took > options.stop_after:
            opened[-1].reap(run.folder)
        records = [record for record in run.records() if record.last]
        delays = sorted(one.finished_at - one.last.jobs[-1].outcome.end for one in records if one.last)
        print(json.dumps({
            "cases": planned, "submitted": by_program.get("sbatch", 0), "records": len(records),
            "measured": sum(record.status == "measured" for record in records), "seconds": round(took, 1),
            "payload_s": round(3 * step_s, 2), "at_once": options.at_once, "calls": calls, "by_program": by_program,
            "calls_per_s": round(calls / took, 3), "peak_rss_mb": round(peak / 1e6, 1), "cpu_s": round(busy, 1),
            "delay_median_s": round(statistics.median(delays), 2), "delay_max_s": round(delays[-1], 2),
        }, indent=1))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
