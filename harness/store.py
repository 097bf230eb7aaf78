"""Run directories: every file name, file versions, atomic writes and the lock. Only this module opens a record."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from harness import __version__, schema
from harness.errors import HarnessError
from harness.files import write_atomically
from harness.schema import Environment, Outcome, Plan, Record, Ticket

T = TypeVar("T", bound=BaseModel)

PACK_OVER_BYTES = 262_144
"""Event files above this are gzipped once their record stands."""

ARTIFACTS_ELSEWHERE = "harness-artifacts-"
"""How the name of a folder begins that holds an attempt's artifacts on another disk."""

LEAST_FREE_BYTES = 1_048_576
"""A disk with less than this free is full: a report takes several times as much."""


class RunInfo(schema.Frozen):
    """What binds a run directory: its matrix, and the environments that its numbers come from."""

    version: int = schema.RUN_VERSION
    name: str
    created_at: float
    harness_version: str
    matrix_source: str
    matrix_sha256: str
    backend: str
    box: str
    environments: tuple[Environment, ...] = ()


def read_value(path: Path, kind: type[T], version: int) -> T:
    """A versioned value from `path`; HarnessError where it is missing, broken or newer than this program."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise HarnessError(f"{path}: no such file", "name a run directory that `harness run` made") from None
    _refuse_newer(path, text, version)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise HarnessError(
            f"{path}: not a {kind.__name__.lower()} this version can read ({where}: {first['msg']})",
            "the file was changed by hand or cut; remove it and run again to measure that case anew",
        ) from None


def _refuse_newer(path: Path, text: str, version: int) -> None:
    with contextlib.suppress(ValueError):
        found: Any = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("version"), int) and found["version"] > version:
            raise HarnessError(
                f"{path}: written in version {found['version']} of this file kind; this harness reads up to {version}",
                "upgrade harness to read it",
            )


class Run:
    """A run directory. Reading needs no lock; whoever writes holds one (`with run.locked():`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def existing(cls, folder: Path) -> Run:
        """The run in `folder`; HarnessError where there is none."""
        if not (folder / "run.json").is_file():
            near = sorted(path.parent.name for path in folder.parent.glob("*/run.json"))
            raise HarnessError(
                f"{folder}: not a run directory (no run.json)",
                f"runs beside it: {', '.join(near)}" if near else "make one with `harness run MATRIX`",
            )
        return cls(folder)

    # -- names

    @property
    def jobs_dir(self) -> Path:
        """Where jobs work."""
        return self.folder / "jobs"

    @property
    def payload_root(self) -> Path:
        """The copy of the payload's code that this run's jobs import."""
        return self.folder / "payload"

    def job_dir(self, job_id: str, attempt: int) -> Path:
        """Working directory of a job's attempt (from 1)."""
        return self.jobs_dir / f"{job_id}.{attempt}"

    def record_path(self, case_id: str) -> Path:
        """Where the record of a case stands, or will."""
        return self.folder / "cases" / case_id / "record.json"

    # -- the run itself

    def info(self) -> RunInfo:
        """What binds this run directory."""
        return read_value(self.folder / "run.json", RunInfo, schema.RUN_VERSION)

    def plan(self) -> Plan:
        """The plan as last run."""
        return read_value(self.folder / "plan.json", Plan, schema.PLAN_VERSION)

    def begin(self, plan: Plan, *, backend: str, box: str, environments: Sequence[Environment]) -> None:
        """Write what binds this run, or refuse to go on with a run of other environments."""
        created_at, known = time.time(), {item.name: item for item in environments}
        if (self.folder / "run.json").is_file():
            info = self.info()
            created_at = info.created_at
            known = {item.name: item for item in info.environments} | known
            _refuse_other_kind(self.folder, info, backend)
            _refuse_other_environment(self.folder, info, environments)
        info = RunInfo(
            name=self.folder.name,
            created_at=created_at,
            harness_version=__version__,
            matrix_source=plan.source,
            matrix_sha256=plan.matrix_sha256,
            backend=backend,
            box=box,
            environments=tuple(known.values()),
        )
        write_atomically(self.folder / "plan.json", plan.model_dump_json(indent=1))
        write_atomically(self.folder / "run.json", info.model_dump_json(indent=1))
        with contextlib.suppress(OSError):
            shutil.copyfile(plan.source, self.folder / "matrix.yaml")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this run directory against a second control plane on this host."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise HarnessError(
                    f"{self.folder}: another harness is working on this run (pid {self.owner() or 'unknown'})",
                    f"wait for it, or end it with `harness cancel {self.folder}`",
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()} {os.uname().nodename}")
            file.flush()
            yield

    def owner(self) -> int | None:
        """Pid of the control plane that holds the lock, `None` where nobody does; HarnessError on another host."""
        try:
            with open(self.folder / "lock", encoding="utf-8") as file:
                text = file.read()
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return None
        except FileNotFoundError:
            return None
        pid, _, node = text.partition(" ")
        if node not in ("", os.uname().nodename):
            raise HarnessError(f"{self.folder}: a harness on {node} is at work on this run", f"go on from {node}")
        return int(pid) if pid.isdigit() else None

    def stage_payload(self, package: Path) -> str:
        """Copy the payload's code into the run, so that a job imports nothing else of ours; returns its SHA-256."""
        target = self.payload_root / "harness"
        digest = hashlib.sha256()
        shutil.rmtree(target, ignore_errors=True)
        for source in _payload_files(package):
            name = source.relative_to(package)
            data = source.read_bytes()
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
        return digest.hexdigest()

    # -- records

    def record(self, case_id: str) -> Record | None:
        """The record of a case, `None` where it has none yet."""
        path = self.record_path(case_id)
        return read_value(path, Record, schema.RECORD_VERSION) if path.is_file() else None

    def records(self) -> list[Record]:
        """All records in the order of the plan; then what ladders added, each in one piece; what is in no plan last."""
        found = {
            path.parent.name: read_value(path, Record, schema.RECORD_VERSION)
            for path in sorted((self.folder / "cases").glob("*/record.json"))
        }
        names = [name for name in dict.fromkeys(map(schema.case_id, self._planned())) if name in found]
        children: dict[str | None, list[str]] = {}
        for name, record in found.items():
            children.setdefault(record.parent, []).append(name)
        return [found[name] for name in dict.fromkeys([*names, *_descendants(names, children), *found])]

    def _planned(self) -> list[schema.AnyCase]:
        if not (self.folder / "plan.json").is_file():
            return []
        plan = self.plan()
        return [*plan.cases, *(skip.case for skip in plan.skips)]

    def adopt(self, path: Path) -> Record:
        """Copy the record at `path` into this run, as it is: its provenance says where it was measured."""
        record = read_record(path)
        write_atomically(self.record_path(record.case_id), path.read_text(encoding="utf-8"))
        return record

    def save(self, record: Record) -> None:
        """Write a record for good."""
        write_atomically(self.record_path(record.case_id), record.model_dump_json(indent=1))

    def disk_full(self) -> bool:
        """Whether the disk of this run has no room worth the name."""
        disk = os.statvfs(self.folder)
        blocks = disk.f_bfree if os.geteuid() == 0 else disk.f_bavail
        return blocks * disk.f_frsize < LEAST_FREE_BYTES

    # -- jobs

    def attempts(self, job_id: str) -> list[int]:
        """Numbers of the attempts at a job that have a directory, ascending."""
        found = []
        for path in self.jobs_dir.glob(f"{glob_escape(job_id)}.*"):
            number = path.name[len(job_id) + 1 :]
            if number.isdigit() and path.is_dir():
                found.append(int(number))
        return sorted(found)

    def ticket(self, job_id: str, attempt: int) -> Ticket | None:
        """The ticket of an attempt, `None` where it was never started or is unreadable."""
        return _quietly(self.job_dir(job_id, attempt) / "ticket.json", Ticket)

    def outcome(self, job_id: str, attempt: int) -> Outcome | None:
        """The outcome of an attempt, `None` where it has none."""
        return _quietly(self.job_dir(job_id, attempt) / "outcome.json", Outcome)

    def cases_of(self, job_id: str, attempt: int) -> set[str]:
        """Ids of the cases that an attempt was asked to measure; empty where its order is unreadable."""
        try:
            order = json.loads((self.job_dir(job_id, attempt) / "job.json").read_text(encoding="utf-8"))
            return {order["case_id"]} if "case_id" in order else {item["id"] for item in order["cases"]}
        except (OSError, ValueError, KeyError, TypeError):
            return set()

    def disown(self, job_id: str, attempt: int) -> None:
        """Let no later run take up an attempt's outcome; needs no space on the disk."""
        ticket = self.job_dir(job_id, attempt) / "ticket.json"
        with contextlib.suppress(OSError):
            ticket.rename(ticket.with_name("ticket.disowned.json"))

    def put_artifacts_on(self, disk: Path, job_id: str, attempt: int) -> None:
        """Let an attempt's artifacts lie in a new folder on another disk, which only this user can enter."""
        made = tempfile.mkdtemp(prefix=f"{ARTIFACTS_ELSEWHERE}{job_id[:40]}-", dir=disk.resolve())
        (self.job_dir(job_id, attempt) / "artifacts").symlink_to(made)

    def artifacts_elsewhere(self, job_id: str, attempt: int) -> Path | None:
        """The folder on another disk that an attempt's artifacts lie in, `None` where they are in the run."""
        return _elsewhere(self.job_dir(job_id, attempt))

    def tidy(self, job_id: str, attempt: int) -> None:
        """After the record stands: drop an attempt's large artifacts and gzip its long event and sample files."""
        folder = self.job_dir(job_id, attempt)
        for place in (folder, *folder.glob("cases/*")):
            self._tidy(place)

    def _tidy(self, folder: Path) -> None:
        if elsewhere := _elsewhere(folder):
            shutil.rmtree(elsewhere, ignore_errors=True)
        if (folder / "artifacts").is_symlink():
            (folder / "artifacts").unlink()
        shutil.rmtree(folder / "artifacts", ignore_errors=True)
        for path in (*folder.glob("events.rank*.jsonl"), *folder.glob("gpu.samples.node*.jsonl")):
            if path.stat().st_size > PACK_OVER_BYTES:
                with open(path, "rb") as source, gzip.open(f"{path}.gz", "wb") as target:
                    shutil.copyfileobj(source, target)
                path.unlink()


def _elsewhere(job_dir: Path) -> Path | None:
    """Where the link in place of a job's artifacts leads, if `put_artifacts_on` made it: no other is followed."""
    link = job_dir / "artifacts"
    if not link.is_symlink():
        return None
    target = link.readlink()
    return target if target.is_absolute() and target.name.startswith(ARTIFACTS_ELSEWHERE) else None


def records_below(folder: Path) -> list[Path]:
    """The files of the records of every run directory at or below `folder`; HarnessError where that is no folder."""
    if not folder.is_dir():
        raise HarnessError(f"{folder}: no such folder", "name one that holds run directories, such as reports/")
    found: list[Path] = []
    for path, names, _ in os.walk(folder):
        if "cases" in names:
            found += sorted(Path(path).glob("cases/*/record.json"))
            names.clear()  # what else a run directory holds is large and no run
    return found


def read_record(path: Path) -> Record:
    """The record at `path`; HarnessError where it cannot be read."""
    return read_value(path, Record, schema.RECORD_VERSION)


def _descendants(names: Sequence[str], children: dict[str | None, list[str]]) -> list[str]:
    """What came from `names` by parent, each line of descent in one piece."""
    found: list[str] = []
    waiting = [child for name in reversed(names) for child in children.get(name, ())]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.append(name)
            waiting += children.get(name, ())
    return found


def glob_escape(text: str) -> str:
    """`text` with the characters that a glob gives meaning to made plain."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in text)


def _quietly(path: Path, kind: type[T]) -> T | None:
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _payload_files(package: Path) -> list[Path]:
    wanted = [package / "__init__.py", package / "events.py", *sorted((package / "payload").rglob("*"))]
    return [path for path in wanted if path.is_file() and "__pycache__" not in path.parts]


def _refuse_other_kind(folder: Path, info: RunInfo, backend: str) -> None:
    replays = {name.partition(":")[0] == "replay" for name in (info.backend, backend)}
    if len(replays) > 1:
        raise HarnessError(
            f"{folder}: begun with the backend {info.backend}; measured and replayed numbers do not mix",
            "give another folder with `--runs DIR`",
        )


def _refuse_other_environment(folder: Path, info: RunInfo, environments: Sequence[Environment]) -> None:
    before = {item.name: item for item in info.environments}
    for now in environments:
        then = before.get(now.name)
        if then and then.digest != now.digest:
            raise HarnessError(
                f"{folder}: its numbers were measured in another {now.name} environment ({_changes(then, now)})",
                "measure into a new directory with `--runs DIR`, or go back to the environment it was begun in",
            )


def _changes(then: Environment, now: Environment) -> str:
    names = sorted(then.libraries.keys() | now.libraries.keys())
    changed = [
        f"{name} {then.libraries.get(name, 'absent')} -> {now.libraries.get(name, 'absent')}"
        for name in names
        if then.libraries.get(name) != now.libraries.get(name)
    ]
    return ", ".join(changed[:4]) or f"{then.digest[:19]} -> {now.digest[:19]}"
