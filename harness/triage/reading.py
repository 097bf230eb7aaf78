"""Paths that a person gives -> streams of bytes: files, folders, compressed ones and archives, bounded in size.

Nothing is unpacked to disk, no link is followed out of a folder, and what is inside an archive is read as it comes.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from harness.errors import HarnessError
from harness.triage.sieve import BLOCK_BYTES

MAX_FILES = 20_000
MAX_MEMBERS = 5_000
MAX_UNPACKED_BYTES = 4 << 30
"""What one compressed file may unpack to; the rest is not read, and that is said."""
_START_BYTES = 4_096
_BROKEN = (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, ValueError)

_RANK_IN_NAME = re.compile(
    r"(?:attempt_\d+/(?P<a>\d{1,6})/|(?:^|[/._-])rank[_.-]?(?P<b>\d{1,6})(?=[._/-]|$)|/(?P<c>\d{1,6})/std(?:err|out)|std(?:err|out)\.(?P<d>\d{1,6})$"
    r"|_r(?P<e>\d{1,6})(?=\.)|(?:events|trace|dump|nccl_trace_rank_)\.?rank(?P<f>\d{1,6}))"
)
_ONLY_A_RANK = re.compile(r"(?:[a-z]{1,12}[_.-]?)?rank[_.-]?\d{1,6}(?:[_.-][a-z]{1,10}){0,3}|std(?:err|out)\.\d{1,6}")
_HOST_IN_NAME = re.compile(
    r"(?:^|[/._-])(?P<host>(?:node|host|worker|gpu|ip|nid|pod)-?[\w-]{0,60}\d[\w-]{0,40})(?=[./]|$)"
)
_EVENTS = re.compile(r"events\.rank\d{1,6}\.jsonl")
_JOB_LOG = re.compile(rf".*\.log|nvidia-smi\.txt|nccl_trace_rank_.*|{_EVENTS.pattern}")


@dataclass(frozen=True)
class Source:
    """One file to read: how it is called in evidence, and its bytes in blocks."""

    name: str
    open: Callable[[], IO[bytes]]
    size_bytes: int
    alone: bool = False
    """Given by itself: it may hold all ranks, so that only a name that tells a rank and nothing else is believed."""

    @property
    def rank(self) -> int | None:
        """The rank whose file it is, as its name says."""
        if self.alone and not _ONLY_A_RANK.fullmatch(self.name):
            return None
        found = list(_RANK_IN_NAME.finditer(self.name))[-1:]
        return int(next(group for group in found[0].groups() if group)) if found else None

    @property
    def host(self) -> str | None:
        """The host whose file it is, as its name says."""
        found = _HOST_IN_NAME.search(self.name)
        if found and self.alone and found["host"] != self.name.partition(".")[0]:
            return None
        return found["host"] if found else None

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, a few megabytes at a time; a damaged end is as if the file ended there."""
        left, block = MAX_UNPACKED_BYTES, bytearray()
        try:
            with closing(self.open()) as file:
                while left > 0 and (piece := file.read1(min(BLOCK_BYTES, left))):  # type: ignore[attr-defined]
                    left -= len(piece)
                    block += piece
                    if len(block) >= BLOCK_BYTES:
                        yield bytes(block)
                        block.clear()
        except _BROKEN:
            pass  # what came before the damage counts
        if block:
            yield bytes(block)


def sources(paths: Sequence[Path]) -> Iterator[Source]:
    """Everything under `paths` that may be a log, in the order of names; HarnessError for a path that is not there."""
    for path in paths:
        if not path.exists():
            raise HarnessError(f"{path}: no such file or folder", "Give log files, or a folder that holds them.")
        base = path if path.is_dir() else path.parent
        for index, file in enumerate(_files(path)):
            if index >= MAX_FILES:
                break
            name = str(file.relative_to(base)) if path.is_dir() else file.name
            yield from _opened(name, file, len(paths) == 1 and not path.is_dir())


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for folder, folders, names in os.walk(path, followlinks=False):
        folders.sort()
        if any(map(_EVENTS.fullmatch, names)):
            names, folders[:] = _logs_of_a_job(names), [name for name in folders if name == "logs"]
        for name in sorted(names):
            file = Path(folder) / name
            if file.is_file() and not file.is_symlink():
                yield file


def _logs_of_a_job(names: list[str]) -> list[str]:
    """Of the files in a job directory of ours, what its programs said; settings and samples would be misread."""
    return [name for name in names if _JOB_LOG.fullmatch(name) and name not in ("pids.log", "supervisor.log")]


def _errors_and_ends(path: Path) -> IO[bytes]:
    """An event file in which every other line is empty, so that the numbers of its lines stay."""
    told = (b'"kind":"error"', b'"kind":"end"')
    with path.open("rb") as lines:
        return io.BytesIO(b"".join(line if any(word in line for word in told) else b"\n" for line in lines))


def _opened(name: str, file: Path, alone: bool) -> Iterator[Source]:
    try:
        with open(file, "rb") as start:
            head = start.read(_START_BYTES)
        size = file.stat().st_size
    except OSError as error:
        raise HarnessError(f"{file}: {error.strerror}", "Make it readable, or leave it out.") from error
    unpack = _errors_and_ends if _EVENTS.fullmatch(file.name) else _unpacker(head)
    if _is_tar(file, unpack, head):
        yield from _members(name, file)
    else:
        yield Source(name, functools.partial(unpack or _plain, file), size, alone)


def _plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _unpacker(head: bytes) -> Callable[[Path], IO[bytes]] | None:
    if head.startswith(b"\x1f\x8b"):
        return lambda path: gzip.open(path, "rb")  # type: ignore[return-value]
    if head.startswith(b"\xfd7zXZ\x00"):
        return lambda path: lzma.open(path, "rb")
    if head.startswith(b"BZh"):
        return lambda path: bz2.open(path, "rb")
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstd
    return None


def _zstd(path: Path) -> IO[bytes]:
    try:
        from compression import zstd  # type: ignore[import-not-found]
    except ImportError:
        raise HarnessError(f"{path}: this Python cannot unpack zstd", f"Unpack it first: zstd -d {path}") from None
    return zstd.open(path, "rb")  # type: ignore[no-any-return]


def _is_tar(file: Path, unpack: Callable[[Path], IO[bytes]] | None, head: bytes) -> bool:
    try:
        if unpack is not None:
            with closing(unpack(file)) as inside:
                head = inside.read(_START_BYTES)
    except _BROKEN:
        return False
    return head[257:262] == b"ustar"


def _members(name: str, file: Path) -> Iterator[Source]:
    """The files inside an archive, each read whole within a bound when its turn comes."""
    left = MAX_UNPACKED_BYTES
    try:
        with tarfile.open(file, "r|*") as archive:
            for index, member in enumerate(archive):
                if index >= MAX_MEMBERS or left <= 0:
                    return
                opened = archive.extractfile(member) if member.isfile() else None
                if opened is None:
                    continue
                content = opened.read(min(left, MAX_MEMBER_BYTES))
                left -= len(content)
                yield Source(f"{name}/{member.name}", (lambda content=content: io.BytesIO(content)), len(content))  # type: ignore[misc]
    except _BROKEN:
        return


MAX_MEMBER_BYTES = 256 << 20
"""Of one file inside an archive, which is held in memory while it is read."""
