"""What launchers say of the ranks that they started: torchrun's table of failures, Composer, mpirun."""

from __future__ import annotations

import re

from harness.triage.facts import Facts, quote

_FAILED_FIRST = re.compile(r"first observed failure")
_RANK = re.compile(r"(?:^|[^\w.-])rank\s{0,9}:\s{0,3}(\d{1,6})\b")
_HOST = re.compile(r"\bhost\s*:\s*([\w.-]{1,200})")
_EXIT = re.compile(r"\bexitcode\s*:\s*(-?\d{1,3})\b")
_FAILED_RANK = re.compile(r"(?:^|[^\w.-])rank\s{0,9}:\s{0,3}(\d{1,6}) \(local_rank: \d{1,5}\)")
_ENDED = re.compile(r"exitcode\s*: -?\d{1,3} \(pid: (\d{1,9})\)")
_CLOSED = re.compile(r"exitcode\s*: -15\b")
_EXITED = re.compile(  # what Composer and mpirun say of a rank
    r"[Gg]lobal rank (?P<rank>\d{1,6}) \(PID \d{1,9}\) exited with code (?P<code>-?\d{1,3})\b"
    r"|process rank (?P<process>\d{1,6}) with PID \d{1,9} on node \S{1,200} exited on signal (?P<signal>\d{1,2})\b"
)


class Launched:
    """Takes the lines of one file that may be of a launcher, in order, and adds what they say to its facts."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._table: dict[str, str] | None = None

    def take(self, number: int, text: str) -> None:
        """One line."""
        if _FAILED_FIRST.search(text):
            self.close()
            self._table = {}
        if failed := _FAILED_RANK.search(text):
            self._facts.failed.add(int(failed[1]))
        if ended := _ENDED.search(text):
            self._facts.listed.add(ended[1])
        if (left := _EXITED.search(text)) and left["code"] not in ("0", "-15"):
            rank, code = int(left["rank"] or left["process"]), int(left["code"] or -int(left["signal"]))
            self._facts.tables.append((rank, code, None, number, quote(text), self._facts.attempts))
        if self._table is not None:
            self._row(self._table, number, text)

    def _row(self, table: dict[str, str], number: int, text: str) -> None:
        for name, form in (("rank", _RANK), ("host", _HOST), ("exit", _EXIT)):
            if found := form.search(text):
                table.setdefault(name, found[1])
                if name == "exit":
                    table |= {"line": str(number), "text": quote(text)}

    def end(self) -> None:
        """The end of the file: what torchrun ended because a rank had failed was not ended from outside."""
        self.close()
        failed = {table[5] for table in self._facts.tables if table[1] not in (None, 0, -15)}
        self._facts.events = [
            one for one in self._facts.events
            if not (one.attempt in failed and one.failure_class == "terminated_external" and _CLOSED.search(one.text))
        ]  # fmt: skip

    def close(self) -> None:
        """The end of a table."""
        table, self._table = self._table, None
        if table and "rank" in table:
            code = int(table["exit"]) if "exit" in table else None
            self._facts.tables.append((int(table["rank"]), code, table.get("host"), int(table.get("line", 0)),
                                       table.get("text", ""), self._facts.attempts))  # fmt: skip
