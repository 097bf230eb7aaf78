"""`case_payload` with the GPU sampler of a real one around it: long enough for a few samples."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import case_payload

from harness.payload import sampler, train

with open("job.json") as file:
    job = json.load(file)
sidecar = train.watch_gpus(job["case"])
time.sleep(0.8)
case_payload.train(job, job["case"])
sampler.stop(sidecar)
