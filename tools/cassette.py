"""Copy what a replay needs of a run directory, with no name, address or path of the machine that it was recorded on.

    tools/cassette RUN_DIR OUT [MATRIX]

MATRIX: another matrix, of the same name, that plans some of the recorded cases alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import launch, matrix, schema, store
from harness.schema import Record
from harness.scrub import scrub

EVIDENCE = ("*.log", "logs/**/*.log", "stacks.rank*.txt")
"""What else is kept of a job that failed."""
NOT_EVIDENCE = frozenset({"pids.log", "supervisor.log"})
LOG_END_BYTES = 16_384
PLAIN_PATHS = ("/usr/", "/dev/", "/proc/", "/sys/", "/etc/", "/lib", "/bin/", "/harness/", "/runs/", "/python/", "/v1/")
"""How a path may begin that tells nothing of a machine, or that stands in for one that did."""
_PATH = re.compile(r"(?<![\w.:/<>*{}-])/[a-zA-Z][\w.+-]*/[\w.+/-]+")
_ADDRESS = re.compile(r"(?<![\d.\"])(?!127\.|0\.0\.0\.0)\d{1,3}(?:\.\d{1,3}){3}(?![\d.])")
_GPU = re.compile(r"GPU-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Names:
    """What stands for each name of the recording machine."""

    def __init__(self, run: Path) -> None:
        self._plain: dict[str, str] = {}
        self._gpus: dict[str, str] = {}
        self._hosts: dict[str, str] = {}
        for order in sorted(run.glob("jobs/*/supervisor.json")):
            self._learn(run.name, json.loads(order.read_text()))
        for path in sorted(run.glob("cases/*/record.json")):
            for host in (json.loads(path.read_text())["provenance"] or {"hosts": []})["hosts"]:
                self._hosts.setdefault(host, f"host{len(self._hosts) + 1}")

    def _learn(self, name: str, order: dict[str, Any]) -> None:
        """Where the run, the environments and the interpreter were."""
        run = order["cwd"].rpartition("/jobs/")[0]
        self._plain[run] = f"/runs/{name}"
        environment = order["argv"][0].rpartition("/bin/")[0]
        checkout, found, _ = environment.rpartition("/.envs/")
        self._plain[checkout if found else environment] = "/harness" if found else "/python"

    def replaced(self, text: str) -> str:
        """`text` without the machine's names."""
        for old, new in sorted(self._plain.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(old, new)
        for old, new in self._hosts.items():
            text = re.sub(rf"(?<![\w.-]){re.escape(old)}(?![\w.-])", new, text)
        text = _GPU.sub(lambda uuid: self._gpu(uuid[0]), text)
        text = _PATH.sub(lambda path: path[0] if path[0].startswith(PLAIN_PATHS) else _short(path[0]), text)
        return _ADDRESS.sub("192.0.2.1", text)

    def _gpu(self, uuid: str) -> str:
        return self._gpus.setdefault(uuid, f"GPU-00000000-0000-0000-0000-{len(self._gpus) + 1:012}")


def _short(path: str) -> str:
    """The part of a path below the libraries, else its name."""
    below = path.rpartition("/site-packages/")[2] if "/site-packages/" in path else path.rpartition("/")[2]
    return f"/python/{below}"


def copy(run: Path, out: Path, plan_file: Path) -> None:
    """Write the cassette, with what ladders added; KeyError where the matrix plans a case that was not recorded."""
    names = Names(run)
    plan = matrix.load(plan_file)
    out.mkdir(parents=True)
    (out / "matrix.yaml").write_text(plan_file.read_text())
    (out / "run.json").write_text(names.replaced((run / "run.json").read_text()))
    records = {}
    cases = [*plan.cases, *(record.case for record in store.Run(run).records() if record.parent)]
    for case in [*cases, *(skip.case for skip in plan.skips)]:
        text = (run / "cases" / schema.case_id(case) / "record.json").read_text()
        records[schema.case_id(case)] = Record.model_validate_json(text)
        _write(out / "cases" / schema.case_id(case) / "record.json", names, _compact(text))
    for group in launch.group(cases):
        last = records[schema.case_id(group[0])].last
        for job in last.jobs if last else ():
            failed = any(records[schema.case_id(case)].status == "failed" for case in group)
            _copy_job(run / job.dir, out / job.dir, names, failed)


def _compact(text: str) -> str:
    return json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")) + "\n"


def _copy_job(job: Path, out: Path, names: Names, failed: bool) -> None:
    series = (*job.glob("events.rank*.jsonl*"), *job.glob("gpu.samples.node*.jsonl*"))
    for path in sorted({job / "outcome.json", *series, *(_evidence(job) if failed else ())}):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_END_BYTES) if path.suffix in (".log", ".txt") else 0)
            text = file.read().decode("utf-8", "replace")
        if text:
            _write(out / path.relative_to(job), names, text)
    for number, path in enumerate(sorted(job.glob("nccl.*.log"))):  # whose names hold the host's
        _write(out / f"nccl.host.{number}.log", names, _choices_once(path.read_text("utf-8", "replace")))


def _choices_once(text: str) -> str:
    """NCCL's log with what it chose for a collective said once, and not again for each of a hundred."""
    seen: set[str] = set()
    kept = []
    for line in text.splitlines():
        choice = line.partition("NCCL INFO ")[2] if " Bytes -> Algo " in line else ""
        if choice not in seen:
            kept.append(line)
        seen.update([choice] if choice else [])
    return "\n".join(kept)


def _evidence(job: Path) -> Iterator[Path]:
    for pattern in EVIDENCE:
        found = (path for path in job.glob(pattern) if not path.name.startswith("nccl."))
        yield from (path for path in found if path.name not in NOT_EVIDENCE)


def _write(path: Path, names: Names, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(scrub(names.replaced(text)))


def main() -> int:
    """The command line; returns the exit code."""
    if len(sys.argv) not in (3, 4):
        print(__doc__)
        return 2
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    copy(run, out, Path(sys.argv[3]) if len(sys.argv) == 4 else run / "matrix.yaml")
    print(f"{out}: {sum(path.stat().st_size for path in out.rglob('*') if path.is_file())} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
