"""NCCL's own log files (`NCCL_DEBUG=INFO`, subsystems INIT, ENV, NET, GRAPH, TUNING, one per process) -> `NcclFacts`.

The wording is that of NCCL 2.19 to 2.28 (`src/init.cc`, `src/debug.cc`, `src/transport/*.cc`, `src/graph/search.cc`,
`src/enqueue.cc`);
what a line does not say in these words is left out. Files may be cut at any byte; nothing raises.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.observe.coerce import text
from harness.schema import NcclChoice, NcclFacts, NcclLink

FILE_BYTES = 4_000_000
"""Read of each file: its start, where the connections are made."""
MAX_FILES = 256
MAX_LINKS = 64
MAX_CHOICES = 64
MAX_WARNINGS = 12
MAX_NAMES = 24

_VERSION = re.compile(r"NCCL version (\S{1,60})")
_COMM = re.compile(r"comm \w+ rank (\d{1,6}) n[rR]anks (\d{1,6})\b.*(?:Init COMPLETE|nNodes)")
_NODES = re.compile(r"\bnNodes (\d{1,5})\b")
_CHANNEL = re.compile(
    r"Channel (\d{1,4})(?:/\w+)? : (\d{1,6})\[\w+\] -> (\d{1,6})\[\w+\](?: \[(send|receive)\])? via (\S{1,80})"
)
_NETWORK = re.compile(r"Using network (\S{1,40})")
_INTERFACES = re.compile(r"NET/(?:Socket|IB) : Using(.*)")
_INTERFACE = re.compile(r"\[\d+\]([\w.-]{1,40})")
_SOCKET = re.compile(r"Bootstrap ?: Using ([\w.-]{1,40}):")
_RING_PATH = re.compile(r"Pattern 4, .*\btype (\w{1,8})/(\w{1,8})")
_CONNECTED = re.compile(r"Connected (all rings|all trees|NVLS tree|binomial trees|collnet)", re.IGNORECASE)
_NVLS_CHANNELS = re.compile(r"\b([1-9]\d{0,3}) nvls channels")
_CHOICE = re.compile(
    r"\b(\w{1,30}): (\d{1,15}) Bytes -> Algo (\w{1,20}) proto (\w{1,20}) channel\{Lo\.\.Hi\}=\{(\d{1,4})\.\.(\d{1,4})\}"
)
_ENVIRONMENT = re.compile(r"\b(NCCL_\w{1,60}) set (?:by environment )?to (.{0,200})")
_WARNING = re.compile(r"NCCL WARN (.{1,400})")
_DEVICE_NUMBER = re.compile(r"^(NET/[^/]+)/\d+(?:\(\d+\))?")
ALGORITHMS = {"all rings": "ring", "all trees": "tree", "nvls tree": "nvls", "binomial trees": "binomial tree",
              "collnet": "collnet"}  # fmt: skip


@dataclass
class _Seen:
    """What the lines have said so far."""

    version: str | None = None
    ranks: int | None = None
    nodes: int | None = None
    connections: set[tuple[int, int, int, str]] = field(default_factory=set)
    network: str | None = None
    names: dict[str, dict[str, None]] = field(default_factory=dict)
    choices: dict[NcclChoice, None] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def name(self, kind: str, value: str, most: int = MAX_NAMES) -> None:
        """Remember one of several names, each once."""
        found = self.names.setdefault(kind, {})
        if len(found) < most:
            found[text(value, 300) or ""] = None


def read(job_dirs: Iterable[Path]) -> NcclFacts | None:
    """The facts of these jobs' ranks; `None` where NCCL wrote no file."""
    files = [path for folder in job_dirs for path in sorted(folder.glob("nccl.*.log"))][:MAX_FILES]
    return parse([line for path in files for line in _lines(path)], len(files)) if files else None


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, "rb") as file:
            yield from file.read(FILE_BYTES).decode("utf-8", "replace").split("\n")
    except OSError:
        return


def parse(lines: Sequence[str], files: int = 1) -> NcclFacts:
    """The facts that these lines state; each end of a connection may state it, and it counts once."""
    seen = _Seen()
    for line in lines:
        if "NCCL" in line:
            for pattern, take in _TAKES:
                if match := pattern.search(line):
                    take(seen, match)
    counted = Counter(transport for *_, transport in seen.connections)
    pairs = Counter((source, target, transport) for _, source, target, transport in seen.connections)
    links = [NcclLink(source=source, target=target, transport=transport, channels=channels)
             for (source, target, transport), channels in sorted(pairs.items())[:MAX_LINKS]]  # fmt: skip
    names = {kind: tuple(found) for kind, found in seen.names.items()}
    return NcclFacts(
        version=seen.version, ranks=seen.ranks, nodes=seen.nodes, transports=dict(sorted(counted.items())),
        links=tuple(links), network=seen.network, interfaces=names.get("interface", ()), paths=names.get("path", ()),
        algorithms=names.get("algorithm", ()), choices=tuple(seen.choices), environment=seen.environment,
        warnings=names.get("warning", ()), files=files,
    )  # fmt: skip


# ---------------------------------------------------------------- one function per wording


def _version(seen: _Seen, match: re.Match[str]) -> None:
    seen.version = seen.version or text(match[1], 60)


def _comm(seen: _Seen, match: re.Match[str]) -> None:
    seen.ranks = max(seen.ranks or 0, int(match[2]))


def _nodes(seen: _Seen, match: re.Match[str]) -> None:
    seen.nodes = max(seen.nodes or 0, int(match[1]))


def _channel(seen: _Seen, match: re.Match[str]) -> None:
    transport = text(_DEVICE_NUMBER.sub(r"\1", match[5]), 80) or ""
    if len(seen.connections) < 100_000:
        seen.connections.add((int(match[1]), int(match[2]), int(match[3]), transport))


def _network(seen: _Seen, match: re.Match[str]) -> None:
    seen.network = text(match[1], 40)


def _interfaces(seen: _Seen, match: re.Match[str]) -> None:
    for name in _INTERFACE.findall(match[1]):
        seen.name("interface", name)


def _socket(seen: _Seen, match: re.Match[str]) -> None:
    seen.name("interface", match[1])


def _path(seen: _Seen, match: re.Match[str]) -> None:
    seen.name("path", match[1])


def _connected(seen: _Seen, match: re.Match[str]) -> None:
    seen.name("algorithm", ALGORITHMS[match[1].lower()])


def _nvls(seen: _Seen, match: re.Match[str]) -> None:
    seen.name("algorithm", "nvls")


def _choice(seen: _Seen, match: re.Match[str]) -> None:
    collective, size, algorithm, protocol, low, high = match.groups()
    if len(seen.choices) < MAX_CHOICES:
        channels = max(0, int(high) - int(low)) + 1
        seen.choices[NcclChoice(collective=collective, size_bytes=int(size), algorithm=algorithm, protocol=protocol,
                                channels=channels)] = None  # fmt: skip


def _environment(seen: _Seen, match: re.Match[str]) -> None:
    if len(seen.environment) < MAX_NAMES:
        seen.environment.setdefault(match[1], (text(match[2].strip().rstrip("."), 200) or ""))


def _warning(seen: _Seen, match: re.Match[str]) -> None:
    seen.name("warning", match[1].strip(), MAX_WARNINGS)


_TAKES: tuple[tuple[re.Pattern[str], Callable[[_Seen, re.Match[str]], None]], ...] = (
    (_VERSION, _version), (_COMM, _comm), (_NODES, _nodes), (_CHANNEL, _channel), (_NETWORK, _network),
    (_INTERFACES, _interfaces), (_SOCKET, _socket), (_RING_PATH, _path), (_CONNECTED, _connected),
    (_NVLS_CHANNELS, _nvls), (_CHOICE, _choice), (_ENVIRONMENT, _environment), (_WARNING, _warning),
)  # fmt: skip
