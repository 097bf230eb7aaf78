"""What the phases of a serving job share: its events, its children, and being told to end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from harness.events import EventLog
from harness.payload import client, processes, server, serverlog

ALIVE_EVERY_S = 2.0
POLL_S = 0.25
DYING_S = 10.0


class Ended(BaseException):
    """Somebody asks us to end; not an Exception, so that nothing takes it for a failure of the case."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Ending:
    """SIGTERM and SIGINT: raises `Ended` where we are, but not between a process's start and the line that keeps it."""

    def __init__(self) -> None:
        self.number = 0
        self._held = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._arrive)

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if not self._held:
            raise Ended(number)

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Inside, a signal waits until the end of the block."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.number:
            raise Ended(self.number)

    def ignore(self) -> None:
        """From here on we are on the way out."""
        self._held = True


class Mistake(Exception):
    """What was asked did not come out; the message says all, a traceback would add nothing."""


class ModelMissing(Mistake):
    """The job names a model or adapter that is not there."""


class BenchmarkFailed(Mistake):
    """A load point that is no measurement."""


class SmokeFailed(Mistake):
    """The smoke request's answer breaks a check."""


class Failed(Exception):
    """A phase that did not do what was asked; `fields` are those of an `error` event."""

    def __init__(self, phase: str, cause: BaseException, **more: Any) -> None:
        super().__init__(str(cause))
        plain = isinstance(cause, (Mistake, server.ServerDied, client.Refused))
        trace = "" if plain else "".join(traceback.format_exception(cause))
        self.fields = {"phase": phase, "type": type(cause).__name__, "message": str(cause), "traceback": trace, **more}


@dataclass
class Session:
    """One job: what it asks, where it writes, what it started."""

    job: dict[str, Any]
    log: EventLog
    ending: Ending
    env: dict[str, str]
    """Of every child."""
    running: server.Server | None = None
    failures: list[Failed] = field(default_factory=list)
    _alive_at: float = 0.0
    _seen_bytes: int = -1

    @property
    def case(self) -> dict[str, Any]:
        """The case whose engine arguments hold for all."""
        found: dict[str, Any] = self.job["cases"][0]["case"]
        return found

    @property
    def variant(self) -> dict[str, Any]:
        """The catalog's facts on the model."""
        found: dict[str, Any] = self.job["variant"]
        return found

    @property
    def server(self) -> server.Server:
        """The server, once it is started."""
        assert self.running is not None, "no server was started"
        return self.running

    def alive(self, what: str, *logs: Path) -> None:
        """Say so where these logs grew since the last time; silence is what the hang watch listens for."""
        size = sum(log.stat().st_size for log in logs if log.exists())
        if size != self._seen_bytes and time.monotonic() - self._alive_at >= ALIVE_EVERY_S:
            self._alive_at, self._seen_bytes = time.monotonic(), size
            self.log.write("alive", what=what)

    @contextlib.contextmanager
    def phase(self, name: str, **more: Any) -> Iterator[None]:
        """Write its begin and end; an exception inside becomes `Failed`, with what else its event shall say."""
        began = time.monotonic()
        self.log.write("phase", name=name, state="begin")
        try:
            yield
        except Exception as error:
            raise Failed(name, self._cause(error), log_tail=self.server_tail(), **more) from error
        self.log.write("phase", name=name, state="end", duration_s=time.monotonic() - began)

    def _cause(self, error: Exception) -> Exception:
        """The server's death where that is behind `error`; it may take a few seconds to die of its engine's."""
        if self.running is None or isinstance(error, server.ServerDied) or client.alive(self.running.base_url):
            return error
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.running.process.wait(timeout=DYING_S)
        try:
            self.running.check()
        except server.ServerDied as died:
            return died
        return error

    def server_tail(self, lines: int = 60) -> str:
        """The end of the server's log, where there is one."""
        return serverlog.tail(self.running.log_text(), lines) if self.running else ""

    def child(self, command: list[str], output: Path, what: str) -> tuple[int, str]:
        """Run a process to its end: exit code and output. It is ended where the server dies or we are told to end."""
        watched = (output, self.running.log) if self.running else (output,)
        started: subprocess.Popen[bytes] | None = None
        try:
            with self.ending.held_back(), output.open("wb") as stream:
                started = subprocess.Popen(
                    command, env=self.env, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
            while started.poll() is None:
                if self.running:
                    self.running.check()
                self.alive(what, *watched)
                time.sleep(POLL_S)
        finally:
            if started is not None:
                processes.end(started.pid, 0.0)
                started.wait(timeout=10)
        return started.returncode, output.read_text(encoding="utf-8", errors="replace")
