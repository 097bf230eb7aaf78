"""A GPU made to behave like a smaller one: PyTorch's allocator gets what such a card would leave it."""

from __future__ import annotations

from typing import Any

import torch

from harness.payload.journal import Journal, NotAsRequested

GIB = 2**30
MAX_OUTSIDE_BYTES = 4 * GIB
"""More than this outside PyTorch before anything is loaded is another process's (our own threshold): a CUDA context,
with the communication buffers that may lie beside it, is a fraction of it."""
GROWTH_BYTES = 2**24
"""What lies outside PyTorch has grown once it did by this much."""
PROBE_BYTES = 2**26
"""How far over its limit the allocator is asked, to see it refuse."""


class MemoryCap:
    """The limit of one rank's GPU: the cap less all that lies outside PyTorch's allocator.

    Outside are the CUDA context and, as they come, kernels' code, libraries' and NCCL's buffers; on the smaller card
    they would take as much. Raises NotAsRequested where the GPU cannot behave so.
    """

    def __init__(self, cap_gib: float, device: str, journal: Journal) -> None:
        self._device, self._journal = torch.device(device), journal
        self._asked = f"memory_cap_gib {cap_gib:g}"
        self._cap_bytes = int(cap_gib * GIB)
        torch.empty(1, device=self._device)  # makes the context
        torch.cuda.synchronize(self._device)
        self._outside_bytes, self._total_bytes = self._measure()
        self._refuse_impossible()
        self._limit()
        self._refuse_without_effect()

    def _measure(self) -> tuple[int, int]:
        """Bytes in use outside PyTorch's allocator, and those of the whole GPU, as the driver states them."""
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device), total

    @property
    def _allowed_bytes(self) -> int:
        return max(0, self._cap_bytes - self._outside_bytes)

    def _limit(self) -> None:
        # Of what the device's properties state (c10/cuda/CUDACachingAllocator.cpp, setMemoryFraction); 1 is no limit.
        total = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(self._allowed_bytes / total, self._device)

    def _refuse_impossible(self) -> None:
        outside = f"{self._outside_bytes / GIB:.2f} GiB of it are in use outside PyTorch"
        if self._cap_bytes > self._total_bytes:
            raise NotAsRequested(f"{self._asked} was asked, but the GPU has only {self._total_bytes / GIB:.2f} GiB")
        if self._outside_bytes > MAX_OUTSIDE_BYTES:
            raise NotAsRequested(f"{self._asked} was asked, but {outside} before the model is built: "
                                 "another process holds memory of this GPU")  # fmt: skip
        if not self._allowed_bytes:
            raise NotAsRequested(f"{self._asked} was asked, but {outside}: nothing is left for the model")

    def _refuse_without_effect(self) -> None:
        """Ask for more than the limit: an allocator that grants it is not limited."""
        try:
            torch.empty(self._allowed_bytes + PROBE_BYTES, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            return
        raise NotAsRequested(f"{self._asked} was asked, but PyTorch's allocator gives more than that")

    def follow(self) -> None:
        """Lower the limit where what lies outside has grown, and give back what the allocator holds beyond it."""
        outside, _ = self._measure()
        if outside < self._outside_bytes + GROWTH_BYTES:
            return
        self._outside_bytes = outside
        self._limit()
        if torch.cuda.memory_reserved(self._device) > self._allowed_bytes:
            torch.cuda.empty_cache()
        self._journal.write("note", text=f"{self._asked}: {outside / GIB:.2f} GiB lie outside PyTorch now, "
                                         f"{self._allowed_bytes / GIB:.2f} GiB are left to it")  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What the proof says of it; `allowed_bytes` is read back from the allocator."""
        allowed = torch.cuda.get_per_process_memory_fraction(self._device)
        allowed *= torch.cuda.get_device_properties(self._device).total_memory
        return {"cap_bytes": self._cap_bytes, "outside_torch_bytes": self._outside_bytes,
                "allowed_bytes": round(allowed), "card_bytes": self._total_bytes}  # fmt: skip


def impose(case: dict[str, Any], device: str, journal: Journal) -> MemoryCap | None:
    """The cap that the case asks for, in force from here on; `None` where it asks for none."""
    cap_gib = case.get("memory_cap_gib")
    if cap_gib is None:
        return None
    if device == "cpu":
        raise NotAsRequested(f"memory_cap_gib {cap_gib:g} was asked, but the case runs on no GPU")
    return MemoryCap(cap_gib, device, journal)
