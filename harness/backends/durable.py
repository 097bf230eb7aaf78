"""Small files that neither a crash nor a full disk may lose. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import os
import time

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
RETRY_S = 120.0
"""How long to wait for space on a full disk before giving up."""
OUTCOME_BYTES = 4096


def write_atomically(path: str, text: str, mode: int = 0o644) -> None:
    """Put `text` at `path` in one step: a reader, or a crash, sees the old file or the new one; OSError when full."""
    temporary = f"{path}.new"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _put_in_place(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _put_in_place(temporary: str, path: str) -> None:
    os.rename(temporary, path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Reserved:
    """A file whose space is taken now and whose content comes later, so that a full disk cannot lose it."""

    def __init__(self, path: str, size_bytes: int = OUTCOME_BYTES) -> None:
        self.path = path
        self._temporary = f"{path}.reserved"
        self._size_bytes = size_bytes
        with contextlib.suppress(OSError):  # a disk that is full already: `save` tries again
            self._take()

    def _take(self) -> None:
        with open(self._temporary, "xb") as file:
            file.write(b" " * self._size_bytes)  # not fallocate: an overwrite of written blocks needs no new ones
            file.flush()
            os.fsync(file.fileno())

    def save(self, text: str, retry_s: float = RETRY_S) -> None:
        """Put `text` in place in one step; waits up to `retry_s` for space, then raises OSError."""
        deadline = time.monotonic() + retry_s
        while True:
            try:
                return self._put(text.encode())
            except OSError as error:
                if error.errno not in FULL_DISK or time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def _put(self, content: bytes) -> None:
        with open(self._temporary, "r+b" if os.path.exists(self._temporary) else "wb") as file:
            file.write(content)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        _put_in_place(self._temporary, self.path)


class Lines:
    """A log of short lines whose first bytes are reserved; what a full disk refuses is written at the next chance."""

    def __init__(self, path: str, reserve_bytes: int = 16384) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._at = 0
        self._waiting = b""
        with contextlib.suppress(OSError):
            os.pwrite(self._file, b"\n" * reserve_bytes, 0)  # empty lines, for a reader to skip

    def add(self, lines: list[str]) -> None:
        """Append lines."""
        self._waiting += b"".join(line.encode(errors="replace") + b"\n" for line in lines)
        while self._waiting:
            try:
                written = os.pwrite(self._file, self._waiting, self._at)
            except OSError:
                return
            self._at += written
            self._waiting = self._waiting[written:]

    def close(self) -> None:
        """Give back what was reserved and not used."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._at)
        os.close(self._file)
