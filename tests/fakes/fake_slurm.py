"""Slurm's programs for tests without Slurm: links of their names point here, and SLURM_CONF names a folder of state.

Two nodes, no limit on jobs at once. `down` in the folder makes the controller silent, `gone` makes the queue forget
jobs that ended, `no-accounting` makes sacct fail. Each call appends its name to `calls`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SRUN = {"export", "nodes", "ntasks", "ntasks-per-node", "kill-on-bad-exit"}
PYXIS = {"container-image", "container-mounts", "container-workdir", "container-env", "no-container-mount-home"}
"""Options of srun that scripts use, and those that its plug-in pyxis adds (its README)."""
PROGRAMS = ("sbatch", "squeue", "sacct", "scancel", "srun", "sinfo", "scontrol")
STATE = Path(os.environ.get("SLURM_CONF", "/nonexistent"))


def install(folder: Path) -> Path:
    """Links of Slurm's programs below `folder`; returns their folder for PATH."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name in PROGRAMS:
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__).resolve()} {name} "$@"\n')
        path.chmod(0o755)
    (folder / "state" / "jobs").mkdir(parents=True)
    return programs


def write(job: dict[str, Any]) -> None:
    path = STATE / "jobs" / f"{job['id']}.json"
    path.with_suffix(".new").write_text(json.dumps(job))
    path.with_suffix(".new").rename(path)


def jobs() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(STATE.glob("jobs/*.json"))]


def sbatch(argv: list[str]) -> int:
    script = Path(argv[-1]).resolve()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", script.read_text(), re.MULTILINE))
    if (STATE / "refuse").exists() and "exclude" in asked:
        print(
            "sbatch: error: Batch job submission failed: Requested node configuration is not available", file=sys.stderr
        )
        return 1
    number = 101 + len(list(STATE.glob("jobs/*.json")))
    count = int(asked["nodes"])
    job = {"id": number, "name": asked["job-name"], "state": "RUNNING", "status": 0, "nodes": count,
           "list": "n1" if count == 1 else f"n[1-{count}]"}  # fmt: skip
    write(job)
    with open(asked["output"], "ab") as log:
        started = subprocess.Popen([sys.executable, "-S", __file__, "_run", str(number), str(script)],
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   start_new_session=True)  # fmt: skip
    (STATE / f"pid.{number}").write_text(str(started.pid))
    if (STATE / "lose-answer").exists():  # it was taken, but its sender never hears of it
        (STATE / "lose-answer").unlink()
        print("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", file=sys.stderr)
        return 1
    print(number)
    return 0


def run(argv: list[str]) -> int:
    number, script = argv
    job = next(job for job in jobs() if job["id"] == int(number))
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "SLURM_CONF": str(STATE), "USER": "someone",
           "SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": job["list"], "SLURMD_NODENAME": "n1"}  # fmt: skip
    done = subprocess.run(["bash", script], env=env, cwd=Path(script).parent, check=False)
    job = next(job for job in jobs() if job["id"] == int(number))
    if job["state"] == "RUNNING":
        write(job | {"state": "COMPLETED" if done.returncode == 0 else "FAILED", "status": done.returncode << 8})
    return 0


def srun(argv: list[str]) -> int:
    count = next(int(part.partition("=")[2]) for part in argv if part.startswith("--nodes="))
    options = dict(part.removeprefix("--").partition("=")[::2] for part in argv if part.startswith("--"))
    if unknown := options.keys() - SRUN - PYXIS:
        print(f"srun: unrecognized option {unknown}", file=sys.stderr)
        return 2
    if options.keys() & PYXIS:
        (STATE / "container.json").write_text(json.dumps(options))
    command = argv[next(index for index, part in enumerate(argv) if not part.startswith("-")) :]
    tasks = [subprocess.Popen(command, env=os.environ | {"SLURMD_NODENAME": f"n{node + 1}", "SLURM_NODEID": str(node)})
             for node in range(count)]  # fmt: skip
    return max(task.wait() for task in tasks)


def squeue(argv: list[str]) -> int:
    wanted = next((part.partition("=")[2].split(",") for part in argv if part.startswith("--name=")), None)
    for job in jobs():
        ended = job["state"] != "RUNNING"
        if (wanted is None or job["name"] in wanted) and not (ended and (STATE / "gone").exists()):
            print(f"{job['id']}|{job['state']}|{job['status']}|{job['list']}|None|{job['name']}|")
    return 0


def sacct(argv: list[str]) -> int:
    if (STATE / "no-accounting").exists():
        print("sacct: error: Slurm accounting storage is disabled", file=sys.stderr)
        return 1
    for job in jobs():
        print(f"{job['id']}|{job['state']}|{job['status'] >> 8}:0|{job['list']}|{job['name']}")
    return 0


def scancel(argv: list[str]) -> int:
    for number in (part for part in argv if part.isdigit()):
        job = next(job for job in jobs() if job["id"] == int(number))
        if job["state"] == "RUNNING":
            write(job | {"state": "CANCELLED"})
            pid = int((STATE / f"pid.{number}").read_text())
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGTERM)
            time.sleep(0.3)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    return 0


def main() -> int:
    program, argv = sys.argv[1], sys.argv[2:]
    if program == "_run":
        return run(argv)
    with open(STATE / "calls", "a") as calls:
        calls.write(f"{program}\n")
    if (STATE / "down").exists() and program != "srun":
        print(f"{program}: error: Unable to contact slurm controller (connect failure)", file=sys.stderr)
        return 1
    if program == "sinfo":
        print("n1|idle\nn2|down*")
    elif program == "scontrol":
        print("\n".join(f"n{number}" for number in range(1, int(re.findall(r"(\d+)\]", argv[-1])[0]) + 1)))
    else:
        return {"sbatch": sbatch, "squeue": squeue, "sacct": sacct, "scancel": scancel, "srun": srun}[program](argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
