"""What looks like a failure, and after which the program evidently went on."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from harness.triage.facts import Event, Facts
from harness.triage.signature import kinds
from harness.triage.vocabulary import WEAK_END

_OF_THE_PROGRAM = re.compile(
    r"train_runtime|Do not forget|done training in|\"kind\":\"end\"|Trainer\.fit|code=0|bus bandwidth"
    r"|Out of bounds values|successfully finished|exiting program|Successful requests"
    r"|Benchmark Result|agent_finish|SUCCESS|Received 0 from"
    r"|exits successfully|End time of|(?:exit|return)(?:ed)?[^\n]{0,12} ?(?:code|status):? ?0\b"
)
"""Good ends that only the program itself or its launcher says; any other sentence a script may say after a failure."""


def of_the_program(end: str) -> bool:
    """Whether a good end is the program's own word, or its launcher's."""
    return _OF_THE_PROGRAM.search(end) is not None


_UP = re.compile(r"startup complete|fired up")
_NOTED = re.compile(r"NCCL INFO|\[W\d{3,4} ")
_OF_A_REQUEST = frozenset({"data_format", "hub_access", "model_unsupported", "serve_kv_cache"})
_REFUSED = re.compile(r'HTTP/[12][.\d]{0,2}" 4\d\d')
"""What a server answers to a request that it cannot serve, and goes on."""
_ANSWERED = re.compile(r'HTTP/[12][.\d]{0,2}" 2\d\d')


_GRAVE = re.compile(
    r"\b(?:ERROR|FATAL|CRITICAL)\b|[Ff]atal\b|panicked at|Check fail|CHECK fail|\" 5\d\d |\b[EF]\d{4} \d\d:\d\d:"
)
"""What a line in earnest says of itself, whatever its words are."""


def troubled_after(facts: Facts) -> bool:
    """Whether the log ends with complaints that no signature knows, after the last step and the last good answer."""
    steps = [mark.line for mark in facts.marks.values()]
    last = max([*steps, *(line for line, _, _ in facts.serving)], default=0)
    return any(line > last and _GRAVE.search(text) for line, text in facts.telling)


def survived(facts: Facts, event: Event, others: Sequence[Event]) -> bool:
    """Whether the run went on and ended well, or the server went on answering, after this."""
    given_up = _given_up(facts, event)
    ends = [text for line, text, attempt in facts.good_ends
            if event.line < line < given_up and attempt == facts.attempts and not WEAK_END.search(text)]  # fmt: skip
    by_itself = any(map(of_the_program, ends))
    own = facts.marks.get(event.who.rank) if event.who.rank is not None else None
    later = {rank for rank, mark in facts.marks.items() if event.line < mark.line < given_up}
    on = event.who.rank in later if own else bool(later)
    # A rank's error is not survived because others still step and a script says that all is done.
    alone = bool(event.kind) and event.who.rank is not None and not {event.who.rank, -1} & later
    ended = by_itself or (bool(ends) and not alone)
    if event.failure_class == "nan_loss":
        return sum(one.failure_class == "nan_loss" for one in others) == 1 and on
    if event.signature is not None:
        tried_again = event.signature.weak and kinds()[event.failure_class].spoken_of
        return (ended and (on or tried_again)) or _only_mentioned(facts, event) or _served_on(facts, event)
    if any(rank == event.who.rank and code not in (None, 0, -15) for rank, code, *_ in facts.tables):
        return False  # the launcher saw just this rank fail: steps of others came after it
    answered = any(line > event.line and "shutdown" not in text for line, text, _ in facts.serving)
    return by_itself or on or answered


def _given_up(facts: Facts, event: Event) -> float:
    """The line after `event` in which a launcher gives up: what comes after it is of another program."""
    lines = [line for _, code, _, line, _, attempt in facts.tables
             if code not in (None, 0) and line > event.line and attempt == event.attempt == facts.attempts]  # fmt: skip
    return min(lines, default=math.inf)


def _only_mentioned(facts: Facts, event: Event) -> bool:
    """Whether words that ordinary messages use too stand in no exception, and their speaker stepped on."""
    steps = facts.marks.get(-1 if event.who.rank is None else event.who.rank)
    spoken_of = event.failure_class == "peer_lost" or kinds()[event.failure_class].spoken_of
    if not spoken_of or event.kind:
        return False
    return (steps is not None and steps.line > event.line) or _left_at_the_end(facts, event)


def _left_at_the_end(facts: Facts, event: Event) -> bool:
    """Whether a rank only notes, after the last step or a good end, that another left before it."""
    if event.failure_class != "peer_lost" or not _NOTED.search(event.text):
        return False
    last = max((mark.line for mark in facts.marks.values()), default=0)
    return _all_steps(facts) or any(last < line < event.line for line, _, _ in facts.good_ends)


def _all_steps(facts: Facts) -> bool:
    """Whether the count of steps came to its total, after which ranks leave each other as they end."""
    return facts.total is not None and facts.total[0] >= facts.total[1] > 0


def _served_on(facts: Facts, event: Event) -> bool:
    """Whether a server got over it: it came up after trouble of its set-up, or answered after a client's mistake."""
    after = [text for line, text, _ in facts.serving if line > event.line]
    if kinds()[event.failure_class].spoken_of and any(_UP.search(text) for text in after):
        return True
    before = any(line < event.line for line, _, _ in facts.serving)
    asked = event.failure_class in ("data_format", "hub_access") and any(_ANSWERED.search(text) for text in after)
    refused = event.failure_class in _OF_A_REQUEST and bool(after) and _REFUSED.search(after[0]) is not None
    return before and (asked or refused)
