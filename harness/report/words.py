"""How values read: sizes, times, counts; and hostile text made plain. Every string of a record passes here."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

GIB = 2**30
MISSING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
NOT_MEASURED = "not measured"
LINE_LIMIT = 400
"""Characters of one line that are shown; the rest is counted."""
TEXT_LIMIT = 6_000
"""Characters of one block of log that are shown, its end kept."""

_ANSI = re.compile(r"\x1b(?:\][^\x07\x1b]*(?:\x07|\x1b\\)?|\[[0-?]*[ -/]*[@-~]?|[@-Z\\-_])|\x9b[0-?]*[ -/]*[@-~]")
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode categories that show nothing or reorder what stands beside them."""
_UNSEEN_CHARACTER = re.compile(r"[^\n\t\x20-\x7e\xa1-\xac\xae-\u02ff\u0370-\u05cf]")


class Cell(NamedTuple):
    """One value as a person reads it."""

    text: str
    why: str = ""
    """What stands behind it, or why nothing does."""
    sort: float | str | None = None
    """What orders a column; `None` comes last."""
    href: str = ""


def missing(why: str = NOT_MEASURED) -> Cell:
    """A dash that says why it is one; never zero."""
    return Cell(MISSING, why)


def clean(text: str, limit: int = TEXT_LIMIT) -> str:
    """Text from a log made harmless to read: colour codes gone, unseen characters named, long lines and texts cut."""
    if len(text) > 4 * limit:
        text = text[: 4 * limit] + f"… [{len(text) - 4 * limit:,} more characters]"
    plain = _ANSI.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    seen = _UNSEEN_CHARACTER.sub(_name_unseen, plain)
    return _cut("\n".join(_cut(line, LINE_LIMIT) for line in seen.split("\n")), limit)


def clean_end(text: str, limit: int = TEXT_LIMIT) -> str:
    """As `clean`, but the end of the text is what is kept: a log's last lines say why it ended."""
    if len(text) <= limit:
        return clean(text, 2 * limit)
    cut = text[-limit:].split("\n", 1)
    kept = cut[-1] or cut[0]
    return f"[{len(text) - len(kept):,} characters before this]\n{clean(kept, 2 * limit)}"


def one_line(text: str, limit: int = LINE_LIMIT) -> str:
    """Text from a log as one clean line."""
    if len(text) <= limit and text.isprintable():
        return " ".join(text.split())
    return _cut(" ".join(clean(text, 4 * limit).split()), limit)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… [{len(text) - limit:,} more characters]"


def _name_unseen(match: re.Match[str]) -> str:
    character = match[0]
    return f"<U+{ord(character):04X}>" if unicodedata.category(character) in _UNSEEN else character


# ---------------------------------------------------------------- numbers


def number(value: float | None, why: str = NOT_MEASURED) -> Cell:
    """A number with three significant digits, whole from 100 up."""
    return missing(why) if value is None else Cell(digits(value), "", value)


def digits(value: float) -> str:
    """`1,234`, `12.3`, `0.0123`: three significant digits, whole from 100 up."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    if size < 1e-4:
        return f"{value:.2e}"
    places = 1 if size >= 9.995 else 2 if size >= 0.9995 else 3 if size >= 0.09995 else 4 if size >= 0.009995 else 5
    return f"{value:.{places}f}"


def count(value: int | None, why: str = NOT_MEASURED) -> Cell:
    """A whole number in full."""
    return missing(why) if value is None else Cell(f"{value:,}", "", value)


def gib(value: float | None, why: str = NOT_MEASURED) -> Cell:
    """Bytes as GiB, without the unit."""
    return missing(why) if value is None else Cell(digits(value / GIB), f"{value:,.0f} bytes", value)


def size(value: float | None, why: str = NOT_MEASURED) -> Cell:
    """Bytes with the unit that fits."""
    if value is None:
        return missing(why)
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return Cell(f"{digits(value / scale)} {unit}", f"{value:,.0f} bytes", value)
    return Cell(f"{value:,.0f} B", "", value)


def ms(value: float | None, why: str = NOT_MEASURED) -> Cell:
    """Seconds as milliseconds, without the unit."""
    return missing(why) if value is None else Cell(digits(value * 1e3), f"{value:.6g} s", value)


def percent(value: float | None, why: str = NOT_MEASURED) -> Cell:
    """A share as per cent, with its sign."""
    return missing(why) if value is None else Cell(f"{digits(value * 100)} %", "", value)


def duration(value: float | None, why: str = NOT_MEASURED) -> Cell:
    """Seconds with the unit that fits."""
    if value is None:
        return missing(why)
    if value < 1:
        return Cell(f"{digits(value * 1e3)} ms", f"{value:.6g} s", value)
    if value < 120:
        return Cell(f"{digits(value)} s", f"{value:.6g} s", value)
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
    return Cell(text, f"{value:.6g} s", value)


def plural(amount: int, noun: str) -> str:
    """`1 case`, `2 cases`."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")
