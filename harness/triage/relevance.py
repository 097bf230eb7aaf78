"""Which questions a line can answer at all, remembered by the line with its numbers taken out.

A log repeats few sentences with other numbers; asking each of them only what its words allow makes reading many times
faster than trying every expression on every line.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

from harness.triage import numbers, vocabulary
from harness.triage.anchors import anchors
from harness.triage.signature import signatures

MAX_REMEMBERED = 20_000
NUMBER = re.compile(r"\d+")

_WORDS: Mapping[str, tuple[str, ...]] = {
    "frame": ('File "', 'File \\"', "File &quot;", ".py in ", ".py:# in", ".py:#, in", ".pyx:# in"),
    "traceback": ("Traceback", ".py in "),
    "exception": ("Error", "Exception", "Interrupt", "Exit", "Failure", "Failed", "Timeout", "exceptions.",
    "exception.",
                  "errors.", "error.", "exc.", "BadZipFile", "Expired", "BrokenProcessPool", "OutOfResources",
                  "NotFound", "Unavailable", "Unsupported", "Mismatch", "Denied", "Exceeded"),
    "crash": ("panicked", "heck fail", "HECK fail", "Segmentation fault", "egfault", "SIGSEGV",
              "core dumped", "Fatal Python", "terminate called", "Caught signal",
              "exitcode", "xit code #", "xit code: ", "xit Code: ", "signal #", "SIGABRT", "Aborted ("),
    "table": ("first observed failure", "rank", "host", "exitcode"),
    "closed": ("Sending process #",),
    "work": ("SeqNum=", "last enqueued"),
    "sized": ("lement", "umel", "ount", "hape", "ize", "ength", "len"),
    "mark": ("tep", "STEP", "ter", "poch", "it/s", "s/it"),
    "telling": ("rror", "ERROR", "FAILED", "WARN", "fatal", "FATAL", "CRITICAL", "panicked", "heck fail", "HECK fail"),
    "good_end": ("_runtime", "Do not forget", "stopped: `max_", "omplete", "COMPLETE", "inished", "done", "ucce",
                 "SUCCEEDED", "passed", "code", "status", "Out of bounds values", "Avg bus bandwidth", "agent_finish",
                 "saved", "Saved", "Serving Benchmark", "ended ", "exiting program", '"kind":"end"', "SUCCESS",
                 "ccuracy", "erplexity", "F#", "BLEU", "ROUGE", "core", "Received #", "End time", "wandb: ", "Done"),
    "serving": ("startup complete", "shutdown complete", "Uvicorn running", "fired up", "HTTP/", "[GIN]",
                "llama runner", "is listening on", "slots are idle", "router", "Started "),
    "healthy": ("Pass", "ECC Errors", "Init COMPLETE", "Xid Errors", "healthy"),
    "nccl_rank": ("nranks",),
}  # fmt: skip


def _literals() -> dict[str, tuple[str, ...]]:
    found = dict(_WORDS)
    for name in ("PHASE", "RESTART", "START", "END"):
        found[name.lower()] = anchors([getattr(vocabulary, name).pattern])
    for name, form in numbers.FORMS.items():
        found[f"number:{name}"] = anchors([form.pattern])
    for index, signature in enumerate(signatures()):
        if "log" in signature.where:
            found[f"signature:{index}"] = anchors(signature.any)
    return found


@functools.cache
def _table() -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((name, tuple({NUMBER.sub("#", word) for word in words})) for name, words in _literals().items())


class Relevance:
    """Remembers for each sentence which questions it can answer."""

    def __init__(self) -> None:
        self._known: dict[str, frozenset[str]] = {}

    def of(self, text: str) -> frozenset[str]:
        """Names of the questions whose literals stand in `text`, numbers aside."""
        sentence = NUMBER.sub("#", text)
        found = self._known.get(sentence)
        if found is None:
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            found = self._known[sentence] = frozenset(name for name, words in _table() if _any(words, sentence))
        return found


def _any(words: Iterable[str], sentence: str) -> bool:
    return any(word in sentence for word in words)
