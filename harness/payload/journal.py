"""One rank's event file seen as phases: which one it is in, how long each took, and where an error struck."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness.events import EventLog

TRACEBACK_CHARACTERS = 6000


def host_name() -> str:
    """This host, by the name that a scheduler knows it by, where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class NotAsRequested(Exception):
    """What is set up differs from what the case asks: no number may come of it."""


class Nonfinite(Exception):
    """A loss or gradient norm is NaN or infinite."""


class Journal:
    """Writes events and keeps the current phase."""

    def __init__(self, log: EventLog, rank: int) -> None:
        self.rank = rank
        self.write = log.write
        self.phase: str | None = None
        self._began = 0.0

    def enter(self, phase: str) -> None:
        """End the current phase, if any, and begin `phase`."""
        self.leave()
        self.phase, self._began = phase, time.monotonic()
        self.write("phase", name=phase, state="begin")

    def leave(self) -> None:
        """End the current phase."""
        if self.phase is not None:
            self.write("phase", name=self.phase, state="end", duration_s=time.monotonic() - self._began)
            self.phase = None

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase as a block; an exception leaves it open, so that the error names it."""
        self.enter(phase)
        yield
        self.leave()

    def error(self, error: BaseException) -> None:
        """The last line of a rank that fails by its own word."""
        self.write("error", phase=self.phase, type=type(error).__name__, message=str(error),
                   traceback="".join(traceback.format_exception(error))[-TRACEBACK_CHARACTERS:])  # fmt: skip


def describe(journal: Journal, **more: Any) -> None:
    """Write a note made of `key: value` pairs."""
    journal.write("note", text=", ".join(f"{key}: {value}" for key, value in more.items()))
