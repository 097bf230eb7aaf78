"""Logs of any origin -> one verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.schema import LogVerdict
from harness.triage import recorder, sieve
from harness.triage.facts import Facts
from harness.triage.gather import Gatherer
from harness.triage.judge import judge
from harness.triage.reading import Source, sources
from harness.triage.told import Files

BINARY_SHARE = 0.02
"""Of control bytes in a file's first block: beyond it the file is no text."""
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\b\f\x1b"))


def triage(paths: Sequence[Path]) -> LogVerdict:
    """What the logs under `paths` tell; HarnessError where there is nothing that can be read as a log."""
    facts: list[Facts] = []
    dumps: list[recorder.Dump] = []
    left_out: list[str] = []
    for source in sources(paths):
        found = _read(source)
        if isinstance(found, Facts):
            facts.append(found)
        elif isinstance(found, recorder.Dump):
            dumps.append(found)
        else:
            left_out.append(source.name)
    if not facts and not dumps:
        named = ", ".join(left_out[:3]) or ", ".join(map(str, paths))
        hint = "Give text logs, archives of them, or Flight Recorder dumps."
        raise HarnessError(f"nothing that can be read as a log: {named}", hint)
    notes = (f"not text, left out: {', '.join(left_out[:5])}",) if left_out else ()
    return judge(Files(tuple(facts), tuple(dumps), notes))


def _read(source: Source) -> Facts | recorder.Dump | None:
    """What one file says; None where it is empty or no text."""
    blocks = source.blocks()
    head = next(blocks, b"")
    if not head:
        return None
    whole = chain([head], blocks)
    if recorder.looks_like_dump(head[:65_536]):
        dump = recorder.read(source.name, source.rank, whole)
        if dump or head[:1] == b"\x80":
            return dump
        whole = chain([head], source.blocks())
        next(whole)
        return Gatherer(source.name, source.rank, source.host).take_all(sieve.lines(source.blocks()))
    text = _text(head, whole)
    return Gatherer(source.name, source.rank, source.host).take_all(sieve.lines(text)) if text else None


def _text(head: bytes, blocks: Iterator[bytes]) -> Iterator[bytes] | None:
    """The blocks as UTF-8 text; None where they are no text."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return (block.decode("utf-16", "replace").encode() for block in blocks)
    sample = head[:262_144]
    return blocks if len(sample) - len(sample.translate(None, _CONTROL)) <= BINARY_SHARE * len(sample) else None


def as_json(verdict: LogVerdict) -> dict[str, Any]:
    """The verdict as one JSON object for a machine."""
    said = verdict.model_dump(mode="json")
    names = ("class", "culprit", "cause")
    return {
        "class": said.pop("failure_class"),
        "summary": said.pop("summary"),
        "culprit": said.pop("culprit"),
        "status": {name: said.pop(f"{name}_status") for name in names},
        **said,
    }
