"""Memory peaks by phase and one event per optimizer step, of one rank.

On a CPU a peak is the process's resident set (VmHWM, cleared through /proc/self/clear_refs); on a GPU PyTorch's
allocated and reserved peaks beside what the whole device has in use.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import torch

from harness.payload.cap import MemoryCap
from harness.payload.journal import Journal, Nonfinite, NotAsRequested

GROWTH = 1.01
"""A phase that comes back every step is written again only where its peak grew by more than this factor."""


COLD_ONLY: dict[str, int | None] = {"peak_reserved_bytes": None, "device_used_bytes": None, "peak_rss_bytes": None}
"""What a process with a past does not say of a case."""


def rss_bytes(key: str = "VmRSS") -> int | None:
    """This process's resident set now (`VmRSS`) or its peak (`VmHWM`); None where /proc does not say."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None


class MemoryMeter:
    """Peaks since the last restart, kept as a maximum per phase.

    In a `warm` process, which has measured other cases before, only what PyTorch has allocated says something of this
    case: what its allocator reserves, and what the device has in use, depend on the cases before.
    """

    def __init__(self, journal: Journal, device: str, cap: MemoryCap | None = None, warm: bool = False) -> None:
        self._journal, self.cap, self.warm = journal, cap, warm
        self._cuda = device.startswith("cuda")
        self._kept: dict[str, dict[str, int | None]] = {}

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
            control.write("5")

    def record(self, phase: str) -> None:
        """Write the peak since the last restart as one of `phase` where it is its largest, and restart."""
        peak = self._peak()
        key = "peak_allocated_bytes" if self._cuda else "peak_rss_bytes"
        before = self._kept.get(phase)
        if before is None or (peak[key] or 0) > (before[key] or 0) * GROWTH:
            self._kept[phase] = peak
            self._journal.write("memory", phase=phase, **peak)
        if self.cap:
            self.cap.follow()
        self.restart()

    def _peak(self) -> dict[str, int | None]:
        found: dict[str, int | None] = {"peak_allocated_bytes": None, "peak_reserved_bytes": None,
                                        "device_used_bytes": None, "peak_rss_bytes": rss_bytes("VmHWM")}  # fmt: skip
        if self._cuda:
            free, total = torch.cuda.mem_get_info()
            found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
            found["device_used_bytes"] = total - free
        return {**found, **COLD_ONLY} if self.warm else found


class StepMeter:
    """Clocks of one optimizer step, from asking for its data to its optimizer's last update."""

    def __init__(self, journal: Journal, memory: MemoryMeter, case: dict[str, Any], world_size: int) -> None:
        self._journal = journal
        self._memory = memory
        self._warmup_steps = case["warmup_steps"]
        self._sharded = case["strategy"] == "fsdp"
        self._world_size = world_size
        self._cuda = case["device"] == "cuda"
        self.first = True
        self.begin()

    def begin(self) -> None:
        """The step starts: it asks for its data."""
        self._wall, self._start = time.time(), time.monotonic()
        self._data_wait_s: float | None = None
        self._before_collective_s: float | None = None
        self._forward_began: float | None = None
        self._loss = torch.zeros(())
        self._end = 0.0

    def data_arrived(self) -> None:
        """All micro-batches of the step are here; what follows may wait for other ranks."""
        self._data_wait_s = time.monotonic() - self._start

    def count(self, batches: list[dict[str, torch.Tensor]], items_of_all_ranks: Any) -> None:
        """Count the step's tokens; `items_of_all_ranks` is what the loss is divided by."""
        self._tokens = int(sum(batch["attention_mask"].sum() for batch in batches))
        self._padded_tokens = sum(batch["input_ids"].numel() for batch in batches)
        items = int(sum((batch["labels"][..., 1:] != -100).sum() for batch in batches))
        self._own_share = float(items_of_all_ranks) / (self._world_size * max(items, 1))

    def forward_begins(self) -> None:
        """This rank's model starts on a micro-batch; where it is sharded, its first collective follows at once."""
        if self._forward_began is None:
            self._forward_began = time.monotonic()
            if self._sharded:
                self._before_collective_s = self._data_wait_s

    def forward_ends(self) -> None:
        """The model is done with a micro-batch: from here on ranks wait for each other."""
        self._synchronize()
        if self._before_collective_s is None and self._forward_began is not None:
            self._before_collective_s = (self._data_wait_s or 0.0) + time.monotonic() - self._forward_began
        if self.first:
            self._memory.record("first_forward")
            self.first = False
        else:
            self._memory.restart()

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's part of the step's loss, as the trainer scales it."""
        self._loss = self._loss.to(loss.device) + loss

    def backward_ends(self) -> None:
        """Gradients are complete and clipped."""
        self._memory.record("backward")

    def optimizer_ends(self) -> None:
        """Parameters are updated."""
        self._memory.record("optimizer_step")

    def end(self) -> None:
        """The step is over."""
        self._synchronize()
        self._end = time.monotonic()

    def write(self, step: int, grad_norm: float, learning_rate: float) -> None:
        """Write the step's event; raises Nonfinite at a NaN or infinity, after naming it in an event of its own."""
        loss = self._loss.item() * self._own_share
        # In a warm process the kernels of the first step are compiled already: its time would say so of no other run.
        lasted = None if self._memory.warm and step == 1 else self._end - self._start
        self._journal.write("step", step=step, warmup=step <= self._warmup_steps, start=self._wall,
                            step_time_s=lasted, data_wait_s=self._data_wait_s,
                            before_collective_s=self._before_collective_s, tokens=self._tokens,
                            padded_tokens=self._padded_tokens, loss=loss, grad_norm=grad_norm,
                            learning_rate=learning_rate)  # fmt: skip
        for what, value in (("loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                self._journal.write("nonfinite", step=step, what=what)
                raise Nonfinite(f"{what} is {value} at step {step} on rank {self._journal.rank}")
        if grad_norm == 0.0:
            raise NotAsRequested(f"the gradient norm is zero at step {step}: nothing is being trained")

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


class RoutingMeter:
    """Counts the tokens that each routed expert gets while it is on; a dense model has none."""

    def __init__(self, model: torch.nn.Module) -> None:
        routers = [module for module in model.modules() if type(module).__name__ == "NemotronHTopkRouter"]
        self._counts = [torch.zeros(router.num_experts) for router in routers]
        self._hooks = [
            router.register_forward_hook(partial(self._count, counts))
            for router, counts in zip(routers, self._counts, strict=True)
        ]

    @staticmethod
    def _count(counts: torch.Tensor, _router: Any, _inputs: Any, outputs: Any) -> None:
        chosen = outputs[2].flatten().cpu()
        counts += torch.bincount(chosen, minlength=counts.numel())

    def stop(self) -> float | None:
        """Largest share of one expert over the mean share, worst layer: 1 is even; None for a dense model."""
        for hook in self._hooks:
            hook.remove()
        return max((float(counts.max() / counts.mean()) for counts in self._counts), default=None)
