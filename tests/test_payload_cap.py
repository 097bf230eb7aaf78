"""A capped GPU, on a simulated one: the allocator is limited to what a smaller card would leave it, and follows."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

GIB = 2**30
CONTEXT = GIB // 2


class OutOfMemory(Exception):
    pass


class Card:
    """A GPU with PyTorch's allocator on it, as far as a cap sees them: all sizes in bytes."""

    def __init__(self, total: int, outside: int = CONTEXT, deaf: bool = False) -> None:
        self.total, self.outside, self.deaf = total, outside, deaf
        self.reserved, self.fraction, self.emptied = 0, 1.0, 0

    def torch(self) -> Any:
        module: Any = types.ModuleType("torch")
        module.uint8, module.device, module.empty = "uint8", lambda name: name, self.empty
        module.OutOfMemoryError = OutOfMemory
        module.cuda = types.SimpleNamespace(
            synchronize=lambda device: None,
            mem_get_info=lambda device: (self.total - self.outside - self.reserved, self.total),
            memory_reserved=lambda device: self.reserved,
            get_device_properties=lambda device: types.SimpleNamespace(total_memory=self.total),
            set_per_process_memory_fraction=self.limit,
            get_per_process_memory_fraction=lambda device: self.fraction,
            empty_cache=self.empty_cache,
        )
        return module

    def empty(self, size: int, device: str, dtype: str = "") -> None:
        if self.reserved + size > self.fraction * self.total:
            raise OutOfMemory
        self.reserved += 2 * 2**20 if size < 2**20 else 0

    def limit(self, fraction: float, device: str) -> None:
        assert isinstance(fraction, float)
        assert 0 <= fraction < 1
        self.fraction = 1.0 if self.deaf else fraction

    def empty_cache(self) -> None:
        self.emptied += 1


class Journal:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def write(self, kind: str, text: str) -> None:
        assert kind == "note"
        self.notes.append(text)


@pytest.fixture
def modules() -> Iterator[None]:
    kept = {name: sys.modules.pop(name, None) for name in ("torch", "harness.payload.cap")}
    yield
    for name, module in kept.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def impose(card: Card, cap_gib: float | None, device: str = "cuda:0") -> tuple[Any, list[str]]:
    sys.modules["torch"] = card.torch()
    journal = Journal()
    cap = importlib.import_module("harness.payload.cap")
    return cap.impose({"memory_cap_gib": cap_gib}, device, journal), journal.notes


@pytest.mark.usefixtures("modules")
def test_the_allocator_gets_the_cap_less_what_lies_outside_it() -> None:
    card = Card(140 * GIB)
    found = impose(card, 24.0)[0].facts()
    assert found == {"cap_bytes": 24 * GIB, "outside_torch_bytes": CONTEXT, "allowed_bytes": 24 * GIB - CONTEXT,
                     "card_bytes": 140 * GIB}  # fmt: skip
    assert card.fraction == pytest.approx((24 - 0.5) / 140)


@pytest.mark.usefixtures("modules")
def test_it_follows_what_grows_outside_and_gives_back_what_is_held_beyond() -> None:
    card = Card(140 * GIB)
    cap, notes = impose(card, 24.0)
    card.outside += 2**20
    cap.follow()
    assert cap.facts()["allowed_bytes"] == 24 * GIB - CONTEXT
    card.outside, card.reserved = GIB, 20 * GIB
    cap.follow()
    assert cap.facts()["allowed_bytes"] == 23 * GIB
    assert (card.emptied, len(notes)) == (0, 1)
    card.outside, card.reserved = 5 * GIB, 20 * GIB
    cap.follow()
    assert (cap.facts()["allowed_bytes"], card.emptied) == (19 * GIB, 1)
    card.outside = 30 * GIB
    cap.follow()
    assert cap.facts()["allowed_bytes"] == 0
    assert notes[0] == "memory_cap_gib 24: 1.00 GiB lie outside PyTorch now, 23.00 GiB are left to it"


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("card", "cap_gib", "words"),
    [
        (Card(80 * GIB), 141.0, "memory_cap_gib 141 was asked, but the GPU has only 80.00 GiB"),
        (Card(80 * GIB, outside=9 * GIB), 24.0, "another process holds memory of this GPU"),
        (Card(80 * GIB, outside=2 * GIB), 1.5, "2.00 GiB of it are in use outside PyTorch: nothing is left"),
        (Card(80 * GIB, deaf=True), 24.0, "PyTorch's allocator gives more than that"),
    ],
)
def test_a_card_that_cannot_behave_so_is_not_as_requested(card: Card, cap_gib: float, words: str) -> None:
    with pytest.raises(Exception, match=words) as raised:
        impose(card, cap_gib)
    assert type(raised.value).__name__ == "NotAsRequested"


@pytest.mark.usefixtures("modules")
def test_no_cap_limits_nothing_and_a_cpu_has_none() -> None:
    card = Card(80 * GIB)
    assert impose(card, None)[0] is None
    assert card.fraction == 1.0
    with pytest.raises(Exception, match="runs on no GPU"):
        impose(card, 24.0, "cpu")
