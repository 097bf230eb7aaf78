"""Matrix text -> values that know their line, and the one shape of message about them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from harness.catalog import nearest
from harness.errors import HarnessError


@dataclass(frozen=True, slots=True)
class Node:
    """A value of the matrix: a scalar, a list of nodes or a mapping of names to nodes, and where it stands."""

    value: Any
    file: str
    line: int
    """From 1; of a value in a mapping, the line of its key."""

    def fail(self, message: str, hint: str = "") -> NoReturn:
        """Raise the HarnessError that names this place."""
        raise HarnessError(f"{self.file}:{self.line}: {message}", hint)

    def mapping(self, what: str) -> dict[str, Node]:
        """The value as a mapping."""
        if not isinstance(self.value, dict):
            self.fail(f"{what} must be a mapping of keys to values, not {shown(self)}")
        return self.value

    def items(self) -> list[Node]:
        """The value as a list: a list's items, or the one value itself."""
        return self.value if isinstance(self.value, list) else [self]


def read(path: Path) -> tuple[Node, bytes]:
    """The matrix in `path` as a node, and its bytes; HarnessError where it cannot be read or is no YAML."""
    try:
        content = path.read_bytes()
        text = content.decode()
    except OSError as problem:
        raise HarnessError(f"{path} cannot be read: {problem.strerror}", "give the path of a matrix file") from None
    except UnicodeDecodeError:
        raise HarnessError(f"{path} is no UTF-8 text", "a matrix is a YAML file") from None
    return _parse(text, str(path)), content


def _parse(text: str, file: str) -> Node:
    try:
        return _node(YAML(typ="rt").load(text), file, 1)
    except DuplicateKeyError as problem:
        named = re.search(r'found duplicate key "(.*?)"', str(problem.problem))
        Node(None, file, _line(problem)).fail(f"the key {named[1]!r} stands twice" if named else "a key stands twice")
    except MarkedYAMLError as problem:
        Node(None, file, _line(problem)).fail(f"no valid YAML: {problem.problem or problem.context}")
    except YAMLError as problem:
        raise HarnessError(f"{file}: no valid YAML: {problem}") from None


def _line(problem: MarkedYAMLError) -> int:
    mark = problem.problem_mark or problem.context_mark
    return mark.line + 1 if mark else 1


def _node(value: Any, file: str, line: int) -> Node:
    """`value` of ruamel's round-trip loader, which knows positions, as plain values that do."""
    if isinstance(value, dict):
        places = value.lc.data or {}  # type: ignore[attr-defined]
        inside = {}
        for name, item in value.items():
            # A key that came by a merge (`<<`) has no place of its own: the mapping's stands for it.
            place = places[name][0] + 1 if name in places else line
            inside[_key(name, file, place)] = _node(item, file, place)
        return Node(inside, file, line)
    if isinstance(value, list):
        items = [_node(item, file, value.lc.item(i)[0] + 1) for i, item in enumerate(value)]  # type: ignore[attr-defined]
        return Node(items, file, line)
    if isinstance(value, float):
        return Node(float(value), file, line)
    return Node(value, file, line)


def _key(name: Any, file: str, line: int) -> str:
    if not isinstance(name, str):
        Node(name, file, line).fail(f"the key {name!r} must be a word")
    return name


def shown(node: Node) -> str:
    """A value as a message names it."""
    if isinstance(node.value, list):
        return "a list"
    if isinstance(node.value, dict):
        return "a mapping"
    if node.value is None or isinstance(node.value, bool):
        return {None: "nothing", True: "true", False: "false"}[node.value]
    return repr(node.value)


def refuse_unknown(found: dict[str, Node], known: Iterable[str], where: str) -> None:
    """HarnessError for the first key that is not `known`, naming the nearest one that is."""
    words = list(known)
    for name, node in found.items():
        if name not in words:
            node.fail(f"unknown key {name!r} in {where}{nearest(name, words)}", f"{where} takes: {', '.join(words)}")
