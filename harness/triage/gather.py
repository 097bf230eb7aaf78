"""One file's lines -> what they say: events (matched signatures), exceptions, marks of progress, ends, numbers."""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Iterable

from harness.schema import Role
from harness.triage import vocabulary as words
from harness.triage.facts import QUOTE_CHARS, Event, Facts, Mark, quote
from harness.triage.launched import Launched
from harness.triage.numbers import numbers_in
from harness.triage.relevance import NUMBER, Relevance
from harness.triage.sieve import Kept
from harness.triage.signature import Signature, kinds, signatures

MAX_FRAMES = 240
MAX_EVENTS_PER_SIGNATURE = 64
MAX_LINE_CHARS = 4_000
NEAR_LINES = 6

_SPLIT = re.compile(
    r"\r|\x1b\[[0-9;?]{0,20}[A-Za-ln-z]"
    r"|(?=\[rank\d{1,6}\]:)|(?=(?<=\S)\[Rank \d{1,6}\] Watchdog)|^\{\"log\": ?\""
)
_COLOUR = re.compile(r"\x1b\[[0-9;]{0,20}m")
_SUM = re.compile(r"(?:SeqNum=(?P<seq>\d+), OpType=(?P<op>\w+)(?:, NumelIn=(?P<n>\d+))?)")
_WORK = re.compile(
    r"last enqueued(?: NCCL)? work: (?P<enqueued>-?\d+), last completed(?: NCCL)? work: (?P<completed>-?\d+)"
)
_CLOSED = re.compile(r"Sending process (\d{1,9}) closing signal")
_ASKED = re.compile(r"distributed_c10d\.py\", line \d{1,6}, in (?!wrapper\b|_)(\w{1,60})")
_HEAD = re.compile(
    r"^(?:\[(?:rank|default)\d{1,6}\]:\s?)*\[?[IWEF]\d{4} [\d:.]{8,20}[^\]]{0,120}\]"
    r"|\d\d:\d\d:\d\d(?:[.,]\d+)?|\bpid[= ]\d+"
)
"""What differs between ranks without meaning: the head of a line of PyTorch's, times, process ids."""
_SIZED = re.compile(r"\b(?:element|numel|count|shape|size|length|len)s?\b", re.IGNORECASE)


class Gatherer:
    """Takes the kept lines of one file in order; `facts` is what they say."""

    def __init__(self, file: str, rank: int | None = None, host: str | None = None) -> None:
        self.facts = Facts(file)
        self._rank, self._host = rank, host
        self._labels = True
        """Whether what srun or mpirun puts before a line may be a rank."""
        self._frames: dict[str, deque[str]] = {}
        self._phase = ""
        self._t: float | None = None
        self._counts: dict[str, int] = {}
        self._head: tuple[words.Who, int] = (words.Who(), -NEAR_LINES - 1)
        self._ignored: dict[str, int] = {}
        """Speaker -> line after which Python prints an exception that it goes on after."""
        self._begun = self._ended = False
        self._stopping = False
        self._after_frame: tuple[int, str | None] = (0, None)
        """The line of a frame, and how the next one begins if it is the frame's source, without numbers."""
        self._last_head: tuple[int, str, words.Who] = (0, "", words.Who())
        self._last_frame: tuple[int, str, words.Who] = (0, "", words.Who())
        self._bars: deque[tuple[int | None, str | None, str | None]] = deque(maxlen=8)
        self._launched = Launched(self.facts)
        self._coloured = words.Who()
        """Who spoke last in the line at hand."""
        self._relevance = Relevance()
        self._may: frozenset[str] = frozenset()
        """Questions that the line at hand can answer."""

    def take_all(self, kept: Iterable[Kept]) -> Facts:
        """All lines, and what became of them."""
        for number, line in kept:
            self.take(number, line)
        self._launched.end()
        self._broken_off()
        for mark in self.facts.marks.values():
            mark.text = quote(mark.text)
        return self.facts

    def take(self, number: int, line: bytes) -> None:
        """One line; ranks that share it are told apart."""
        text = line.decode("utf-8", "replace")[: 4 * MAX_LINE_CHARS]
        self._labels = self._labels and not words.other_rank(text)
        whole = text.replace("\\n", "\r") if text.startswith("{") else text  # a record of JSON may hold a traceback
        for piece in _SPLIT.split(whole):
            self._coloured = words.Who()
            for part in _COLOUR.split(piece) if "\x1b" in piece else (piece,):
                if part and not part.isspace():
                    self._piece(number, part[:MAX_LINE_CHARS])

    def _piece(self, number: int, text: str) -> None:
        facts = self.facts
        self._may = self._relevance.of(text)
        self._stopping = self._stopping or words.SHUTDOWN in text
        speaker = words.who(text, self._rank, self._host, labels=self._labels)
        self._t = words.time_of(text) or self._t
        if speaker.rank is None and speaker.key in facts.nccl_ranks:
            speaker = words.Who(speaker.key, facts.nccl_ranks[speaker.key], speaker.host, speaker.gpu)
        if not speaker.key and self._coloured.key:
            speaker = self._coloured  # the name stands in a colour of its own
        self._coloured = speaker
        speaker = self._carried(number, text, speaker)
        if speaker.rank is not None:
            facts.ranks.add(speaker.rank)
        if self._is_frame(number, text, speaker):
            return
        if "table" in self._may:
            self._launched.take(number, text)
        if "closed" in self._may and (closed := _CLOSED.search(text)):
            self.facts.closed.add(closed[1])
        self._progress(number, text, speaker)
        if words.IGNORED.search(text):
            self._ignored[speaker.key] = number
        if self._may & _SAYING or any(name.startswith(("signature:", "number:")) for name in self._may):
            self._said(number, text, speaker)

    def _carried(self, number: int, text: str, speaker: words.Who) -> words.Who:
        """Who says a line of a traceback of which only the head, some lines above, tells the rank."""
        if words.HEADED.search(text):
            self._head = (speaker, number)
        elif not speaker.key and number - self._head[1] <= NEAR_LINES and words.BODY.search(text):
            self._head = (self._head[0], number)
            return self._head[0]
        return speaker

    def _said(self, number: int, text: str, speaker: words.Who) -> None:
        if not words.SOURCE.search(text):
            self.facts.numbers |= numbers_in(text, self._may)
            self._event(number, text, speaker)

    # ------------------------------------------------------------ tracebacks

    def _is_frame(self, number: int, text: str, speaker: words.Who) -> bool:
        """Whether the line belongs to a traceback's body, which is kept as context and says nothing by itself."""
        if "frame #" in text and words.CPP_FRAME.search(text):
            return True
        if self._is_source(number, text):
            self._stack(speaker).append(text[:300])
            return True
        if "frame" in self._may and words.FRAME.search(plain := words.unescaped(text)):
            self._stack(speaker).append(words.as_python_says(plain[:500]).replace("\\", "/"))
            self._after_frame = (number, words.before_frame(plain))
            self._last_frame = (number, text, speaker)
            return not words.EXCEPTION.search(text)
        if self._asked("traceback", words.TRACEBACK, text):
            self._frames.pop(speaker.key, None)
            named = words.NOTEBOOK_HEAD.search(text) is not None
            self._last_head = (number, text, speaker) if named else (0, "", speaker)
            return named
        return False

    def _is_source(self, number: int, text: str) -> bool:
        """Whether this is the line of source under a frame."""
        at, prefix = self._after_frame
        if number != at + 1 or prefix is None or not NUMBER.sub("", text).startswith(prefix):
            return False
        self._after_frame = (0, None)
        return not (self._asked("exception", words.EXCEPTION, text) or self._asked("frame", words.FRAME, text))

    def _asked(self, name: str, form: re.Pattern[str], text: str) -> re.Match[str] | None:
        """A search that is only made where the line's words allow a match."""
        return form.search(text) if name in self._may else None

    def _stack(self, speaker: words.Who) -> deque[str]:
        if len(self._frames) > 2_000:
            self._frames.clear()
        return self._frames.setdefault(speaker.key, deque(maxlen=MAX_FRAMES))

    def _context(self, text: str, speaker: words.Who) -> str:
        frames = self._frames.get(speaker.key) or ()
        return "\n".join([*(frames or (self._phase,)), text])

    def _broken_off(self) -> None:
        """Keep the last frame of a traceback whose error is not there; of one frame alone nothing is made."""
        number, text, speaker = self._last_frame
        frames = self._frames.get(speaker.key) or ()
        after = [*(mark.line for mark in self.facts.marks.values()), *(end[0] for end in self.facts.good_ends)]
        if not frames or any(line > number for line in after):
            return
        if self._last_head[0] and self._last_head[2].key == speaker.key:  # a notebook names the error first
            number, text, speaker = self._last_head
            context = self._context(text.split()[0], speaker)
            fitting = (one for one in signatures() if "log" in one.where and one.pattern.search(text.split()[0]))
        elif sum("line " in one for one in frames) > 1:
            context = "\n".join(frames)
            fitting = (one for one in signatures() if one.any == _ANY_ERROR)
        else:
            return
        found = next((one for one in fitting if one.holds_for(text) and one.suits(context)), None)
        name = found.failure_class if found else "app_exception"
        self.facts.broken_off = self._made(found, name, "initiating", number, text, speaker, None)

    # ------------------------------------------------------------ events

    def _event(self, number: int, text: str, speaker: words.Who) -> None:
        raised = self._asked("exception", words.EXCEPTION, text)
        if raised and number - self._ignored.pop(speaker.key, -MAX_FRAMES) < MAX_FRAMES:
            self._frames.pop(speaker.key, None)
            return
        found = self._signature(text, speaker)
        if found is not None:
            if found.role == "advice" or (self._stopping and found.weak and found.role == "cascade"):
                return
            self._waited_in(found, speaker)
            if found.weak:
                self._crash(number, text, speaker)
            self._keep(self._made(found, found.failure_class, found.role, number, text, speaker, raised))
        elif raised and not raised["type"].endswith(("Exit",)):
            self._keep(self._made(None, "app_exception", "initiating", number, text, speaker, raised))
        elif not self._crash(number, text, speaker) and "telling" in self._may:
            self.facts.telling.append((number, text))
        if raised:
            self._frames.pop(speaker.key, None)
            self._last_head = (0, "", speaker)

    def _crash(self, number: int, text: str, speaker: words.Who) -> bool:
        """Whether the line tells of a crash, which is then kept."""
        if not self._asked("crash", words.CRASH, text):
            return False
        self.facts.crashes.append(self._made(None, "app_exception", "initiating", number, text, speaker, None))
        del self.facts.crashes[16:]
        return True

    def _waited_in(self, found: Signature, speaker: words.Who) -> None:
        """Remember the collective of a rank's time-out, which its traceback names."""
        if found.failure_class != "coll_timeout" or speaker.rank is None:
            return
        if names := _ASKED.findall("\n".join(self._frames.get(speaker.key) or ())):
            self.facts.asked.setdefault(speaker.rank, names[-1])

    def _signature(self, text: str, speaker: words.Who) -> Signature | None:
        """The signature that the line bears; one that only passes on what failed gives way to what the line quotes."""
        context: str | None = None
        passed: Signature | None = None
        for index, signature in _candidates(self._may):
            if not signature.pattern.search(text) or not signature.holds_for(text):
                continue
            if passed and (signature.weak or signature.raised_in or signature.role == "advice"):
                continue
            spoken_of = kinds()[signature.failure_class].spoken_of
            if signature.role == "initiating" and (_advises(text) or (spoken_of and _calm(text))):
                continue
            if signature.looks_around:
                context = self._context(text, speaker) if context is None else context
                if not signature.suits(context):
                    continue
            count = self._counts[index] = self._counts.get(index, 0) + 1
            found = signature if count <= MAX_EVENTS_PER_SIGNATURE else _SPENT
            if not signature.passes_on:
                return found
            passed = passed or found
        return passed

    def _made(self, signature: Signature | None, failure_class: str, role: Role, number: int, text: str,
              speaker: words.Who, raised: re.Match[str] | None) -> Event:  # fmt: skip
        at = signature.pattern.search(text) if signature else raised
        said, kind = quote(text, at.start() if at else 0), raised["type"] if raised else ""
        gpu = words.gpu_of(text) or speaker.gpu
        return Event(failure_class, role, signature, self.facts.file, number, said, speaker, gpu, self._t,
                     self.facts.attempts, kind, bool(self._frames.get(speaker.key)))  # fmt: skip

    def _keep(self, event: Event) -> None:
        self._begun = True
        if len(self.facts.events) < 4_000:
            self.facts.events.append(event)

    # ------------------------------------------------------------ progress, ends, tables

    def _progress(self, number: int, text: str, speaker: words.Who) -> None:
        facts = self.facts
        if self._asked("end", words.END, text):
            self._ended = True
        if self._begun and (
            self._asked("restart", words.RESTART, text) or (self._ended and self._asked("start", words.START, text))
        ):
            facts.attempts += 1
            self._begun = self._ended = False
        if phase := self._asked("phase", words.PHASE, text):
            self._phase = phase[0]
        if nccl := self._asked("nccl_rank", words.NCCL_RANK, text):
            facts.world = max(facts.world or 0, int(nccl["world"]))
            facts.nccl_ranks.setdefault(speaker.key, int(nccl["rank"]))
        told = self._asked("good_end", words.GOOD_END, text) or self._asked("good_end", words.WEAK_END, text)
        if told and not words.NEGATED.search(text):
            facts.good_ends.append((number, text, facts.attempts))
            del facts.good_ends[:-8]
        if self._asked("serving", words.SERVING, text):
            facts.serving.append((number, text, facts.attempts))
            del facts.serving[1:-8]
        if self._asked("healthy", words.HEALTHY, text):
            facts.health.append((number, text))
            del facts.health[8:]
        self._mark(number, text, speaker)
        self._works(text, speaker)

    def _mark(self, number: int, text: str, speaker: words.Who) -> None:
        facts = self.facts
        if found := self._last_mark(text):
            step = int(found["step"] or found["bar"])
            if whole := words.TOTAL.search(text, found.start()):
                facts.total = (int(whole["step"]), int(whole["of"]))
            bar = (speaker.rank, found["bar"], found["of"])
            again = bar in self._bars
            self._bars.append(bar)
            if found["bar"] and (again or (found["bar"] != found["of"] and self._closes(number, speaker))):
                return  # a bar says its last count once more when an exception closes it
            whose = -1 if speaker.rank is None else speaker.rank
            facts.marks[whose] = Mark(step, number, text, self._t, facts.attempts)
        elif speaker.rank is not None and self._asked("sized", _SIZED, text) and len(facts.sized) < 200:
            said = _HEAD.sub("", text)
            of_rank = facts.sized.setdefault(NUMBER.sub("#", said), {})
            of_rank.setdefault(speaker.rank, (tuple(NUMBER.findall(said)), number, text[:QUOTE_CHARS]))

    def _closes(self, number: int, speaker: words.Who) -> bool:
        """Whether a bar here is only closed by an exception, which its program has just ended with."""
        last = self.facts.events[-1] if self.facts.events else None
        return last is not None and bool(last.kind) and last.who.rank == speaker.rank and number - last.line <= 3

    def _last_mark(self, text: str) -> re.Match[str] | None:
        """The last progress bar of a line, else its first mark."""
        found = self._asked("mark", words.MARK, text)
        if found is None or "%" not in text:
            return found
        bars = [one for one in words.MARK.finditer(text) if one["bar"]]
        return None if words.SETUP_BAR.search(text) else (bars[-1] if bars else found)

    def _works(self, text: str, speaker: words.Who) -> None:
        if speaker.rank is None or "work" not in self._may:
            return
        if work := _SUM.search(text):
            self.facts.last_work[speaker.rank] = (int(work["seq"]), int(work["n"] or 0), work["op"])
        if done := _WORK.search(text):
            self.facts.completed[speaker.rank] = int(done["completed"])


def _calm(text: str) -> bool:
    """Whether a line is an ordinary message, a setting or a command line."""
    return bool(words.CALM.search(text)) and not (words.EXCEPTION.search(text) or words.NCCL_WARNS.search(text))


def _advises(text: str) -> bool:
    """Whether a line says what to do if something happens, which it has not."""
    return bool(words.ADVICE.search(text)) and not words.EXCEPTION.search(text)


_ANY_ERROR = (r"(?:Error|Exception)\b",)
"""What the signatures that go by the place alone look for."""
_SAYING = frozenset({"exception", "crash", "telling"})
_SPENT = Signature.model_validate({"class": "no_failure", "any": ["x"], "role": "advice"})
"""Stands for a signature that was found so often that more of it tells nothing."""


@functools.lru_cache(maxsize=4096)
def _candidates(may: frozenset[str]) -> tuple[tuple[str, Signature], ...]:
    """The signatures that a line may hold, in the order in which they are tried."""
    named = ((f"signature:{index}", one) for index, one in enumerate(signatures()))
    return tuple((name, one) for name, one in named if name in may)
