"""What this rank's interpreter has installed, and whether every other rank has the same. Standard library only."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import distributions
from typing import Any

from harness.payload.journal import NotAsRequested

SHOWN = 5


def versions() -> dict[str, str]:
    """Every installed distribution's version, and Python's own; the first of a name on the path is the one in use."""
    found: dict[str, str] = {"python": platform.python_version()}
    for distribution in distributions():
        name = distribution.metadata["Name"] if distribution.metadata else None
        if name:
            found.setdefault(name.lower().replace("_", "-"), distribution.version)
    return found


def digest(found: dict[str, str]) -> str:
    """`sha256:` over the sorted versions."""
    text = json.dumps(found, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def require_same(found: dict[str, str], rank: int, world_size: int, host: str) -> None:
    """NotAsRequested, on every rank alike, naming the ranks whose versions are not those of most ranks.

    Through the key-value store that the ranks met at: no collective, which ranks of different versions may not share.
    """
    if world_size == 1:
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    store.set(f"harness/versions/{rank}", json.dumps({"host": host, "versions": found}))
    everyone = [json.loads(store.get(f"harness/versions/{other}")) for other in range(world_size)]
    if sentence := difference(everyone):
        raise NotAsRequested(sentence)


def difference(everyone: list[dict[str, Any]]) -> str | None:
    """One sentence on the ranks (list index) that differ from most, or None; of two equal camps rank 0's is right."""
    digests = [digest(one["versions"]) for one in everyone]
    if len(set(digests)) == 1:
        return None
    usual = max(digests, key=lambda one: (digests.count(one), one == digests[0]))
    normal = everyone[digests.index(usual)]["versions"]
    said = []
    for rank, one in enumerate(everyone):
        if digests[rank] != usual:
            said.append(f"rank {rank} on {one['host']} has {_apart(one['versions'], normal)}")
    return "; ".join(said[:SHOWN])


def _apart(odd: dict[str, str], normal: dict[str, str]) -> str:
    names = [name for name in sorted({*odd, *normal}) if odd.get(name) != normal.get(name)]
    shown = [f"{name} {odd.get(name, 'missing')} (most ranks: {normal.get(name, 'missing')})" for name in names]
    more = len(shown) - SHOWN
    return ", ".join(shown[:SHOWN]) + (f" and {more} more" if more > 0 else "")
