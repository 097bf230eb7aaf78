"""The signatures: what a failure prints, as data in `signatures/*.yaml`.

A file is a list. Each entry:

| key | meaning |
|---|---|
| class | a name of the taxonomy |
| any | regular expressions, one of which stands in what is looked at; taken from what the libraries print |
| with | further ones, of which one must stand in the same traceback (for a log: the lines before) |
| phase | phases of the payload in one of which an `error` event must have happened |
| where | type, message, traceback (of an `error` event), log; default: message, type, log |
| role | initiating (default), cascade, teardown |
| culprit | rank (default): whoever reports it first; none: it is no rank's own doing |
| summary | one sentence; `{...}` names a value of the case |
| next | what to change first: the first of these lines whose values the case has (an exhausted rung has none) |

The first entry that holds wins, in the order of file names and entries: the narrower stands before the wider.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from ruamel.yaml import YAML

from harness.schema import Frozen, Role

FOLDER = Path(__file__).parent / "signatures"
Where = Literal["type", "message", "traceback", "log"]


class Signature(Frozen):
    """One way in which one class of failure shows."""

    failure_class: str = Field(alias="class")
    any: tuple[str, ...] = Field(min_length=1)
    also: tuple[str, ...] = Field((), alias="with")
    phase: tuple[str, ...] = ()
    where: tuple[Where, ...] = ("message", "type", "log")
    role: Role = "initiating"
    culprit: Literal["rank", "none"] = "rank"
    summary: str
    next: tuple[str, ...] = Field(min_length=1)

    @field_validator("any", "also")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            re.compile(pattern, re.MULTILINE)
        return patterns

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """`any` as one expression."""
        return re.compile("|".join(f"(?:{one})" for one in self.any), re.MULTILINE)

    @functools.cached_property
    def context(self) -> re.Pattern[str] | None:
        """`with` as one expression."""
        return re.compile("|".join(f"(?:{one})" for one in self.also)) if self.also else None


@functools.cache
def signatures() -> tuple[Signature, ...]:
    """All signatures, in the order in which they are tried."""
    yaml = YAML(typ="safe")
    return tuple(Signature.model_validate(entry) for path in sorted(FOLDER.glob("*.yaml")) for entry in yaml.load(path))
