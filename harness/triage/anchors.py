"""The literals that a regular expression cannot match without: what a fast search looks for first."""

from __future__ import annotations

import re
from collections.abc import Iterable
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MIN_CHARS = 3
"""Shorter literals stand in too many lines to be worth looking for."""

Set = frozenset[str]


def anchors(patterns: Iterable[str]) -> tuple[str, ...]:
    """Literals of which one stands in whatever any of `patterns` matches; ValueError for a pattern that has none."""
    found: set[str] = set()
    for pattern in patterns:
        needed = _of(list(parser.parse(pattern)))
        if not needed or min(map(len, needed)) < MIN_CHARS:
            raise ValueError(f"no literal of {MIN_CHARS} characters must stand in {pattern!r}")
        found |= needed
    return tuple(sorted(one for one in found if not any(other != one and other in one for other in found)))


def _of(items: list[tuple[Any, Any]]) -> Set:
    """The best set of literals of a sequence: the one whose shortest member is longest."""
    candidates: list[Set] = []
    run = ""
    for code, argument in items:
        if code is codes.LITERAL:
            run += chr(argument)
            continue
        candidates.append(frozenset({run}))
        run = ""
        candidates.append(_inside(code, argument))
    candidates.append(frozenset({run}))
    return max(candidates, key=_worth)


def _worth(literals: Set) -> tuple[int, int]:
    return (min(map(len, literals), default=0), -len(literals))


def _inside(code: Any, argument: Any) -> Set:
    """The literals that one element of a sequence needs; empty where it needs none."""
    if code is codes.SUBPATTERN:
        return _of(list(argument[-1])) if not argument[1] & re.IGNORECASE else frozenset()
    if code is codes.ATOMIC_GROUP:
        return _of(list(argument))
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT):
        return _of(list(argument[2])) if argument[0] > 0 else frozenset()
    if code is codes.BRANCH:
        return _branches([_of(list(one)) for one in argument[1]])
    return frozenset()


def _branches(each: list[Set]) -> Set:
    return frozenset().union(*each) if all(one and min(map(len, one)) > 0 for one in each) else frozenset()


def either(words: Iterable[str]) -> str:
    """A regular expression for any of `words` that shares their beginnings, which makes it many times faster."""
    branches: dict[str, list[str]] = {}
    for word in sorted(set(words)):
        branches.setdefault(word[:1], []).append(word[1:])
    if "" in branches:
        return ""
    parts = [re.escape(first) + either(rest) for first, rest in branches.items()]
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"
