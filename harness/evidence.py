"""Records made elsewhere that stand for a case here: the same case, environments and type of device.

Measured ones, and those of cases that ran out of memory: that is an answer too, and no other run changes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import frontier, schema, store
from harness.schema import Environment, EnvironmentName, Gpu, Record

Case = schema.AnyCase
Found = Mapping[str, Sequence[Path]]
"""Files of records by case id."""

NEEDS: dict[str, tuple[EnvironmentName, ...]] = {
    "train": ("train",), "serve": ("serve",), "chain": ("train", "serve"), "probe": ("train",),
}  # fmt: skip
"""The environments that a kind of case runs in."""
OF_A_GPU_OR_CPU = frozenset({"measured", "capped"})
"""Kinds of number that a device has given; the others are made from them."""


@dataclass(frozen=True)
class Place:
    """What a number depends on besides its case."""

    environments: tuple[Environment, ...]
    gpus: tuple[Gpu, ...]
    cpu: str

    def digests(self, kind: str) -> dict[str, str]:
        """Of the environments that a case of this kind runs in, by name."""
        return {item.name: item.digest for item in self.environments if item.name in NEEDS[kind]}

    def devices(self, device: str) -> frozenset[str]:
        """The types of device that such a case may meet: of all GPUs, or of the processor."""
        return frozenset(gpu.name for gpu in self.gpus) if device == "cuda" else frozenset({self.cpu})


def below(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """The files of all records at or below `folders`; HarnessError where one of these is no folder."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for path in store.records_below(folder):
            found.setdefault(path.parent.name, []).append(path)
    return found


def standing(case: Case, found: Found, here: Place, failures: bool = True) -> Path | None:
    """The latest record among `found` that decided `case` where it would run `here`; `failures`: too large counts."""
    paths = [(record.finished_at, path) for path in found.get(schema.case_id(case), ())
             if _holds(case, record := store.read_record(path), here, failures)]  # fmt: skip
    return max(paths)[1] if paths else None


def _holds(case: Case, record: Record, here: Place, failures: bool) -> bool:
    of = record.provenance
    answers = {"fits", "too large"} if failures else {"fits"}
    if (
        frontier.Point(record.case_id, 0, record).state not in answers
        or of is None
        or of.number_kind not in OF_A_GPU_OR_CPU
    ):
        return False
    there = Place(of.environments, of.gpus, of.cpu)
    digests, devices = here.digests(case.kind), here.devices(case.device)
    known = len(digests) == len(NEEDS[case.kind]) and bool(devices)
    return known and there.digests(case.kind) == digests and there.devices(case.device) == devices
