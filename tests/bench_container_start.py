"""What a container adds to a case against the venv box; run by hand: .venv/bin/python tests/bench_container_start.py

Needs a Docker Engine, the train-cpu image (`harness build train --variant cpu`) and the environment of `./tools/setup
train`. The same jobs run in either box, in turns, through the local backend: from `submit` until `poll` names them and
`collect` has their outcome, so that making, starting, ending and removing the container all count.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

from harness import backends, boxes
from harness.schema import Job

BUDGET_S = 1.5
ROUNDS = 10
JOBS = {"nothing": "pass", "import torch": "import torch", "the imports of training": "from trl import SFTTrainer"}
"""What the payload does, by the name it has here: with no work, and with the imports of a real one."""


def job(text: str) -> Job:
    """A training job that runs this Python."""
    return Job(
        id="bench", environment="train", case_ids=("bench",), argv=("python", "-c", text), device="cpu", devices=1,
        env={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}, time_limit_s=120, stall_s=120, payload={},
    )  # fmt: skip


def seconds(box: boxes.Box, made: Job, run: Path, number: int) -> float:
    """Wall time of one attempt."""
    folder = run / "jobs" / f"{made.id}.{number}"
    folder.mkdir(parents=True)
    backend = backends.get("local")
    began = time.perf_counter()
    ticket = backend.submit(made, box.wrap(made, folder, run / "payload"), folder)
    while not backend.poll([ticket]):
        time.sleep(0.005)
    outcome = backend.collect(ticket)
    took = time.perf_counter() - began
    if not outcome.ok:
        sys.exit(f"{box.name}: {outcome}\n{(folder / 'stderr.log').read_text()}")
    return took


def main() -> None:
    """Measure and print; exit code 1 over budget."""
    both = {name: boxes.get(name) for name in ("venv", "docker")}
    digests = {name: box.environment("train").digest for name, box in both.items()}
    print(f"{platform.platform()}; {len(JOBS)} jobs, {ROUNDS} rounds each after one that is left out; {digests}")
    worst = 0.0
    for name, text in JOBS.items():
        times: dict[str, list[float]] = {box: [] for box in both}
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder).resolve()
            (run / "payload").mkdir()
            for number in range(2 * (ROUNDS + 1)):
                box = ("venv", "docker")[(number + number // 2) % 2]  # who is first changes with every pair
                took = seconds(both[box], job(text), run, number)
                if number >= 2:
                    times[box].append(took)
        medians = {box: statistics.median(found) for box, found in times.items()}
        added = medians["docker"] - medians["venv"]
        worst = max(worst, added)
        ranges = ", ".join(f"{box} {medians[box]:.2f} s ({min(t):.2f} to {max(t):.2f})" for box, t in times.items())
        print(f"{name}: {ranges}; a container adds {added:.2f} s")
    print(f"{'within' if worst < BUDGET_S else 'OVER'} the budget of {BUDGET_S} s")
    sys.exit(worst >= BUDGET_S)


if __name__ == "__main__":
    main()
