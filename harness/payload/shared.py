"""Measures several cases one after the other in one process: `python -m harness.payload.shared job.json`.

Each has a directory of its own below `cases/`, with the files that a job of its own would have. The first failure ends
the process, and so does memory that a case leaves behind: whoever started it measures the rest in a fresh one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from harness.events import EventLog
from harness.payload import train
from harness.payload.journal import Journal

LEFT_BYTES = {"cuda": 2**26, "cpu": 2**20}
"""What a case may leave allocated before the next: below a hundredth of what any Nano variant takes on a GPU, and below
the weights of a tiny one."""


def main(argv: list[str]) -> int:
    """Measure the cases of job.json; 1 where one failed, else 0, also where some were not begun."""
    stacks = open("stacks.rank0.txt", "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    log = EventLog(".", 0)
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    for earlier, entry in enumerate(job["cases"]):
        device = entry["case"]["device"]
        if earlier and (left := let_go(device)) > LEFT_BYTES[device]:
            log.write("note", text=f"{left} bytes are left of the case before: the rest needs a fresh process")
            break
        order = {"job_id": job["job_id"], "role": "train", "case_id": entry["id"], "case": entry["case"],
                 "variant": job["variant"], "keep": "none", "earlier_cases": earlier}  # fmt: skip
        if status := measure(order, log):
            return status
    log.write("end", ok=True)
    return 0


def measure(order: dict[str, Any], log: EventLog) -> int:
    """One case, in its own directory; `log` hears that something goes on."""
    folder = Path("cases") / order["case_id"]
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        Path("job.json").write_text(json.dumps(order, indent=1), encoding="utf-8")
        status = train.attempt(Path("job.json"), Journal(Heard(log, order["case_id"]), 0))
        shutil.rmtree("artifacts", ignore_errors=True)  # the next case may need the room
        return status


class Heard(EventLog):
    """The event file of one case, of whose events the job's own file hears the kind."""

    def __init__(self, job: EventLog, case_id: str) -> None:
        super().__init__(".", 0)
        self._job, self._case_id = job, case_id

    def write(self, kind: str, **fields: Any) -> None:
        """Append an event."""
        super().write(kind, **fields)
        self._job.write("alive", what=f"{kind} of {self._case_id}")


def let_go(device: str) -> int:
    """Give back all that the case before held, and forget what libraries keep of it; bytes of tensors that are left."""
    import torch
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()
    if device == "cpu":
        living = [found.untyped_storage() for found in gc.get_objects() if isinstance(found, torch.Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in living}.values())
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: as in `train`.
    os._exit(status)
