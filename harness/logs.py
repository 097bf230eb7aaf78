"""The log files of a job as one text in which each line still knows its file and number.

Parts are joined under heads of their own, `==> <file>:<number of the next line> <==`. The text is scrubbed, and of a
long file only the start and the end are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.scrub import scrub

START_BYTES = 262_144
END_BYTES = 1_048_576
MAX_FILES = 64
MAX_LINE_CHARS = 4_000
TAIL_LINES = 120
TAIL_CHARS = 12_000

_NOT_LOGS = frozenset({"pids.log"})
_HEAD = re.compile(r"==> (?P<file>[^\n]{1,400}):(?P<line>\d{1,12}) <==")


@dataclass(frozen=True)
class Line:
    """One line of a log, and where it stands."""

    file: str
    number: int
    text: str


def log_text(job_dirs: Sequence[Path]) -> str:
    """What the jobs in `job_dirs` printed, torchrun's files of each rank first; what cannot be read is left out."""
    return "".join(part for job_dir in job_dirs for path in _files(job_dir) for part in _parts(job_dir, path))


def _files(job_dir: Path) -> list[Path]:
    """The log files of a job: those of single ranks, then what the launcher itself printed."""
    of_ranks = sorted((job_dir / "logs").rglob("*.log"))
    own = sorted(path for path in job_dir.glob("*.log") if path.name not in _NOT_LOGS)
    return [path for path in (*of_ranks, *own) if path.is_file() and not path.is_symlink()][:MAX_FILES]


def _parts(job_dir: Path, path: Path) -> Iterator[str]:
    """The start and the end of one file, each under its head."""
    name = f"{job_dir.name}/{path.relative_to(job_dir)}"
    try:
        with open(path, "rb") as file:
            start = file.read(START_BYTES)
            between, end = _skip_to_end(file.fileno(), path.stat().st_size)
    except OSError:
        return
    line = 1 + start.count(b"\n") + between
    if start:
        yield _part(name, 1, start)
    if end:
        yield _part(name, line, end)


def _skip_to_end(descriptor: int, size: int) -> tuple[int, bytes]:
    """Newlines that are passed over, and the last `END_BYTES` of an open file that stands at `START_BYTES`."""
    passed = 0
    with open(descriptor, "rb", closefd=False) as file:
        while (left := size - END_BYTES - file.tell()) > 0:
            if not (block := file.read(min(left, END_BYTES))):
                break
            passed += block.count(b"\n")
        return passed, file.read(END_BYTES)


def _part(name: str, line: int, content: bytes) -> str:
    lines = content.decode("utf-8", "replace").rstrip().split("\n")
    text = scrub("\n".join(one[:MAX_LINE_CHARS] for one in lines))
    return f"==> {name}:{line} <==\n{text}\n"


def split(text: str) -> Iterator[Line]:
    """The lines of `text` with file and number; before any head, `log` from 1."""
    file, number = "log", 0
    for line in text.split("\n"):
        if line.startswith("==> ") and (head := _HEAD.fullmatch(line)):
            file, number = head["file"], int(head["line"]) - 1
            continue
        number += 1
        yield Line(file, number, line)


def tail(text: str) -> str:
    """The last lines of each file in `text`, scrubbed, short enough for a record."""
    files: dict[str, list[str]] = {}
    for line in split(scrub(text)):
        if line.text.strip():
            files.setdefault(line.file, []).append(line.text[:500])
    share = TAIL_CHARS // max(1, len(files))
    return "\n".join(f"==> {name} <==\n{_last(lines, share)}" for name, lines in files.items())[-TAIL_CHARS:]


def _last(lines: list[str], chars: int) -> str:
    return "\n".join(lines[-TAIL_LINES:])[-chars:]
