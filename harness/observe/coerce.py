"""Values that a stranger wrote as JSON -> values that a frozen type takes, or None. Nothing here raises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from pydantic import JsonValue

from harness.scrub import scrub

Json = dict[str, Any]
_Item = TypeVar("_Item")

_LARGEST = 2**63 - 1
_LARGEST_REAL = 1e100
_LARGEST_SECONDS = 1e12
"""Beyond these a number is no measurement, and sums of it might leave the range of a float."""
_DEPTH = 6
_CHARS = 16_000
_CHARS_OF_ONE = 1000
_CHARS_OF_A_VALUE = 8
"""Depth, characters in all and per string that free-form JSON (a proof, a server's facts) may bring into a record."""


def real(value: Any) -> float | None:
    """A float from a JSON number that is finite and not absurdly large; a bool or a string is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= _LARGEST_REAL else None


def seconds(value: Any) -> float | None:
    """A finite number that is not negative."""
    number = real(value)
    return number if number is not None and 0 <= number <= _LARGEST_SECONDS else None


def count(value: Any) -> int | None:
    """A whole number from 0 to 2**63 - 1; `128.0` is one, `1.5` is not."""
    number = real(value)
    if number is None or not 0 <= number <= _LARGEST or number != int(number):
        return None
    return min(int(value), _LARGEST)


def text(value: Any, limit: int, *, keep_end: bool = False) -> str | None:
    """A string, scrubbed and of about `limit` characters at most: its start, or its end where that is asked for."""
    if not isinstance(value, str):
        return None
    found = scrub(value[-2 * limit :] if keep_end else value[: 2 * limit])
    if len(found) <= limit:
        return found
    return f"[...]{found[-limit:]}" if keep_end else f"{found[:limit]}[...]"


def mapping(value: Any) -> Json:
    """A JSON object, or an empty one."""
    return value if isinstance(value, dict) else {}


def json_value(value: Any) -> JsonValue:
    """Free-form JSON, bounded in depth and size; what is left out reads `[...]`."""
    return _bounded(value, _DEPTH, [_CHARS])


def _bounded(value: Any, depth: int, left: list[int]) -> JsonValue:
    """`value` within `left[0]` characters, which it takes what it needs from."""
    left[0] -= _CHARS_OF_A_VALUE
    if left[0] < 0 or (depth == 0 and isinstance(value, dict | list)):
        return "[...]"
    if isinstance(value, dict):
        return {_cut(str(key), left): _bounded(item, depth - 1, left) for key, item in _first(value.items(), left)}
    if isinstance(value, list):
        return [_bounded(item, depth - 1, left) for item in _first(value, left)]
    if isinstance(value, str):
        return _cut(value, left)
    if value is None or isinstance(value, bool):
        return value
    return count(value) if isinstance(value, int) and value >= 0 else real(value)


def _cut(value: str, left: list[int]) -> str:
    found = text(value, _CHARS_OF_ONE) or ""
    left[0] -= len(found)
    return found if left[0] >= 0 else "[...]"


def _first(items: Iterable[_Item], left: list[int]) -> Iterator[_Item]:
    """The items until nothing is left."""
    for item in items:
        if left[0] < 0:
            return
        yield item
