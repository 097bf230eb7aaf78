"""The signatures: what a failure prints, as data in `signatures/*.yaml`.

A file is a list. Each entry:

| key | meaning |
|---|---|
| class | a name of the taxonomy |
| any | regular expressions, one of which stands in what is looked at; taken from what the libraries print |
| with | further ones, of which one must stand in the same traceback (for a log: the lines before) |
| unless | further ones, of which none may stand there |
| raised_in | places of which the last frame of the traceback must be one |
| when | the name of a check of the line's numbers (`checks.py`) that must hold |
| phase | phases of the payload in one of which an `error` event must have happened |
| where | type, message, traceback (of an `error` event), log; default: message, type, log |
| role | initiating (default), cascade, teardown, advice (what healthy runs print too) |
| kernel | true: the kernel's, driver's or scheduler's own word, which comes before any program's |
| weak | true: counts only where nothing better is found |
| culprit | rank (default): whoever reports it first; none: it is no rank's own doing |
| status | how sure the class is by this alone in any log (default: established) |
| summary | one sentence; `{...}` names a value of the case; default: that of the class |
| next | what to change first: the first of these lines whose values the case has; default: those of the class |

What a class means for a log that is not ours stands in `classes.yaml`.

The first entry that holds wins, in the order of file names and entries: the narrower stands before the wider.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from ruamel.yaml import YAML

from harness.schema import ClaimStatus, Frozen, Role
from harness.triage import checks

FOLDER = Path(__file__).parent / "signatures"
CLASSES = Path(__file__).parent / "classes.yaml"
Where = Literal["type", "message", "traceback", "log"]


class Kind(Frozen):
    """A class of failure as it is told to a person who brings any log."""

    summary: str
    culprit: Literal["rank", "gpu", "host", "none", "nobody"]
    """Whom it can name: `none`, a rank only where it alone among several says so; `nobody`, never one that says so."""
    spoken_of: bool = False
    rung: str | None = None
    next: tuple[str, ...] = Field(min_length=1)
    why: str
    cost: str


@functools.cache
def kinds() -> dict[str, Kind]:
    """All classes of the taxonomy by name."""
    return {name: Kind.model_validate(entry) for name, entry in YAML(typ="safe").load(CLASSES).items()}


class Signature(Frozen):
    """One way in which one class of failure shows."""

    failure_class: str = Field(alias="class")
    any: tuple[str, ...] = Field(min_length=1)
    also: tuple[str, ...] = Field((), alias="with")
    unless: tuple[str, ...] = ()
    raised_in: tuple[str, ...] = ()
    when: Literal["foreign_memory"] | None = None
    phase: tuple[str, ...] = ()
    where: tuple[Where, ...] = ("message", "type", "log")
    role: Role = "initiating"
    kernel: bool = False
    weak: bool = False
    culprit: Literal["rank", "none"] = "rank"
    status: ClaimStatus = "established"
    summary: str
    next: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _of_its_class(cls, entry: dict[str, Any]) -> dict[str, Any]:
        kind = kinds().get(entry["class"])
        return ({"summary": kind.summary, "next": kind.next} | entry) if kind else entry

    @field_validator("any", "also", "unless", "raised_in")
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

    @functools.cached_property
    def excluded(self) -> re.Pattern[str] | None:
        """`unless` as one expression."""
        return re.compile("|".join(f"(?:{one})" for one in self.unless)) if self.unless else None

    def suits(self, traceback: str) -> bool:
        """Whether what stands around a match lets it count."""
        if self.context and not self.context.search(traceback):
            return False
        if self.excluded and self.excluded.search(traceback):
            return False
        return not self.raised_in or bool(self.place and self.place.search(last_frame(traceback)))

    @property
    def looks_around(self) -> bool:
        """Whether more than the line itself decides."""
        return bool(self.also or self.unless or self.raised_in)

    @property
    def passes_on(self) -> bool:
        """Whether it only says that something else failed."""
        return self.weak and self.role == "cascade" and self.failure_class == "app_exception"

    @functools.cached_property
    def place(self) -> re.Pattern[str] | None:
        """`raised_in` as one expression."""
        return re.compile("|".join(f"(?:{one})" for one in self.raised_in)) if self.raised_in else None

    def holds_for(self, text: str) -> bool:
        """Whether the numbers of the line let a match count."""
        return self.when is None or checks.CHECKS[self.when](text)


_FRAME = re.compile(r'File "[^"\n]{1,400}", line \d{1,9}(?:, in \S{1,200})?')
_PASSES_ON = re.compile(r", in (?:__getattr__|wrapper|inner|_?raise\w*|__getitem__)$")


def last_frame(traceback: str) -> str:
    """The frame that raised, without those that only pass on a name; empty where there is none."""
    frames = _FRAME.findall(traceback)
    return next((frame for frame in reversed(frames) if not _PASSES_ON.search(frame)), "")


@functools.cache
def signatures() -> tuple[Signature, ...]:
    """All signatures, in the order in which they are tried."""
    yaml = YAML(typ="safe")
    return tuple(Signature.model_validate(entry) for path in sorted(FOLDER.glob("*.yaml")) for entry in yaml.load(path))
