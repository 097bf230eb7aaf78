"""What a training case holds on each GPU whatever its batch and length, from what its payload proved before a step."""

from __future__ import annotations

import re
from dataclasses import dataclass

from harness.schema import Observation, TrainCase

GIB = 2**30
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_OWNER = re.compile(r"(?P<dtype>\w+) (?P<module>\S+)")


@dataclass(frozen=True)
class Held:
    """A lower bound, and what there was for it, both in bytes on one GPU."""

    held: int
    """Parameters, gradients and optimizer state, all there at once in the first optimizer step."""
    room: int
    """What PyTorch's allocator may take."""

    @property
    def too_much(self) -> str | None:
        """Why no length and no batch fits, in a sentence; `None` where one may."""
        if self.held <= self.room:
            return None
        return (f"weights, gradients and optimizer state alone take {self.held / GIB:.2f} GiB of the "
                f"{self.room / GIB:.2f} that PyTorch may hold, whatever the length and batch")  # fmt: skip


def held(case: TrainCase, observation: Observation, device_bytes: int | None = None) -> Held | None:
    """The bound for a case on GPUs, `None` where its payload did not come to its proof; `device_bytes` of the GPU."""
    proof = observation.train.proof if observation.train else {}
    stored, cap = proof.get("bytes_by_dtype_and_class"), proof.get("memory_cap")
    room = cap.get("allowed_bytes") if isinstance(cap, dict) else device_bytes
    if case.device == "cpu" or case.cpu_offload or not isinstance(stored, dict) or not isinstance(room, int):
        return None
    sizes = {name: size for name, size in stored.items() if isinstance(size, int)}
    trained = {name: size for name, size in sizes.items() if case.method == "full" or name.endswith(" LoRA")}
    return Held(sum(sizes.values()) + round(sum(_beside(case, name, size) for name, size in trained.items())), room)


def _beside(case: TrainCase, name: str, size: int) -> float:
    """Bytes of gradient and of AdamW's two states beside trained parameters of `size` bytes; paged states lie apart."""
    match = _OWNER.fullmatch(name)
    item = ITEM_BYTES.get(match["dtype"], 0) if match else 0
    if not item:
        return 0.0
    states = 0.0 if case.optimizer.startswith("paged") else 2 / item if "8bit" in case.optimizer else 2.0
    return size * (1 + states)
