"""A stream of bytes -> the few lines worth a closer look, with their numbers; one pass, a few megabytes at a time.

What NCCL prints at level INFO is passed over in long runs, except lines with a word that tells something. Elsewhere a
line is kept if it holds one of the literals that some signature, exception, frame or mark needs (`anchors`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

from harness.triage import vocabulary
from harness.triage.anchors import anchors, either
from harness.triage.signature import signatures

BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 16_384
"""Of a longer line only pieces around its literals are looked at."""
PIECE_BYTES = 4_096
MAX_PIECES = 8

MAX_DULL = 100_000
_DIGITS = b"0123456789"
_NUMBERS = re.compile(r"\d+")
_CHATTER = re.compile(rb"(?:[^ \n]{1,200} \[\d{1,3}\] NCCL INFO [^\n]*\n)+")
_CHATTER_MARK = b"] NCCL INFO "
_TELLING = (b"closed", b"rror", b" fail", b"Fail", b" nranks ", b"IFNAME", b"bort", b"Init COMPLETE")

Kept = tuple[int, bytes]
"""Number of a line, from 1, and its bytes without the newline."""


@functools.cache
def _literals() -> re.Pattern[bytes]:
    """The literals without their digits: they are looked for in lines without digits."""
    patterns = [one for signature in signatures() if "log" in signature.where for one in signature.any]
    words = anchors([*patterns, *vocabulary.PATTERNS])
    return re.compile(either(_NUMBERS.sub("", word) for word in words).encode())


def lines(chunks: Iterable[bytes]) -> Iterator[Kept]:
    """The lines worth a look, in order; a line longer than a block counts as pieces of the same number."""
    number, rest = 1, b""
    dull: set[bytes] = set()
    for chunk in chunks:
        block = rest + chunk
        end = block.rfind(b"\n") + 1
        if end == 0 and len(block) < BLOCK_BYTES:
            rest = block
            continue
        end = end or len(block)
        yield from _of_block(block[:end], number, dull)
        number += block.count(b"\n", 0, end)
        rest = block[end:]
    if rest:
        yield from _of_block(rest, number, dull)


def _of_block(block: bytes, number: int, dull: set[bytes]) -> Iterator[Kept]:
    position = 0
    found: Iterable[tuple[int, int]]
    while position < len(block):
        chatter = _CHATTER.match(block, position)
        if chatter:
            end, found = chatter.end(), _telling(block, position, chatter.end())
        else:
            end = _end_of_plain(block, position)
            found = _hits(block, position, end, dull)
        last = position
        for start, stop in found:
            number += block.count(b"\n", last, start)
            last = start
            yield from _cut(number, block[start:stop])
        number += block.count(b"\n", last, end)
        position = end


def _end_of_plain(block: bytes, position: int) -> int:
    """Where the next NCCL chatter begins; at least one line further."""
    first = block.find(b"\n", position) + 1 or len(block)
    mark = block.find(_CHATTER_MARK, first)
    return len(block) if mark < 0 else max(first, block.rfind(b"\n", first, mark) + 1)


def _telling(block: bytes, start: int, end: int) -> list[tuple[int, int]]:
    """Bounds of the lines of chatter that tell something."""
    found: set[tuple[int, int]] = set()
    for word in _TELLING:
        at = block.find(word, start, end)
        while at >= 0:
            bounds = _bounds(block, at, start, end)
            found.add(bounds)
            at = block.find(word, bounds[1], end)
    return sorted(found)


def _hits(block: bytes, start: int, end: int, dull: set[bytes]) -> Iterator[tuple[int, int]]:
    """Bounds of lines that hold a literal; after a frame of a traceback also its line of source.

    A log repeats few sentences with other numbers, so those that hold none are remembered in `dull`.
    """
    search, after_frame = _literals().search, False
    for line in block[start:end].split(b"\n"):
        stop = start + len(line)
        sentence = line.translate(None, _DIGITS)
        if after_frame or sentence not in dull:
            if after_frame or search(sentence):
                yield start, stop
                after_frame = b"File " in line or b".py: in " in sentence
            else:
                dull.add(sentence)
        start = stop + 1
    if len(dull) > MAX_DULL:
        dull.clear()


def _bounds(block: bytes, at: int, start: int, end: int) -> tuple[int, int]:
    stop = block.find(b"\n", at, end)
    return max(start, block.rfind(b"\n", start, at) + 1), end if stop < 0 else stop


def _cut(number: int, line: bytes) -> Iterator[Kept]:
    if len(line) <= MAX_LINE_BYTES:
        yield number, line
        return
    at = 0
    for _ in range(MAX_PIECES):
        hit = _literals().search(line, at)  # those with digits are not found here, which only costs a piece
        if not hit:
            return
        start = max(at, hit.start() - PIECE_BYTES // 4)
        at = max(start + PIECE_BYTES, hit.end())
        yield number, line[start:at]
