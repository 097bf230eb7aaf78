"""What a training case needs of its machine, checked before it loads: a GPU of its own, and disk for what it writes."""

from __future__ import annotations

import errno
import math
import os
import shutil
from typing import Any

from harness.payload.cap import GIB, MAX_OUTSIDE_BYTES

VALUE_BYTES = {"bf16": 2, "fp32": 4}


def check_gpu(device: str) -> None:
    """Raises RuntimeError, worded as PyTorch words it, where other processes hold much of this rank's GPU."""
    import torch

    torch.empty(1, device=device)  # makes the context, which is no other process's
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    if outside > MAX_OUTSIDE_BYTES:
        named = others(device, outside)
        who = "; ".join(f"Process {pid} has {held / GIB:.2f} GiB memory in use" for pid, held in named)
        own = torch.cuda.memory_reserved(device) / GIB
        raise RuntimeError(f"{device} has a total capacity of {total / GIB:.2f} GiB of which {free / GIB:.2f} GiB is "
                           f"free before anything is loaded. {who}. Apart from its CUDA context, this process has "
                           f"{own:.2f} GiB memory in use.")  # fmt: skip


def others(device: str, outside_bytes: int) -> list[tuple[int, int]]:
    """Process id and bytes of each other process on the GPU; as process 0 all that is outside, where none is shown.

    In a container or without NVML the driver names nobody.
    """
    import torch

    found = []
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(uuid))
        found = [(one.pid, one.usedGpuMemory or 0) for one in running if one.pid != os.getpid()]
    except Exception:
        found = []
    return found or [(0, outside_bytes)]


def needed_bytes(case: dict[str, Any], variant: dict[str, Any], keep: str) -> int:
    """What the case will write to `artifacts/`, adapters apart, which are small; from the model's shape alone."""
    from harness.payload import model

    parameters = sum(tensor.numel() for tensor in model.build(case, variant, "meta").parameters())
    weights = parameters * VALUE_BYTES[case["param_dtype"]]
    copies = moments = 0
    if case["method"] == "full":  # the checkpoint, and unless it is sharded both moments of AdamW
        copies = 1
        if case["strategy"] != "fsdp":
            moments = 2 * parameters if "8bit" in case["optimizer"] else 2 * weights
    if keep != "none" and case["weights"] == "random":
        copies += 1  # the base that serving starts from too
    return weights * (copies + (keep == "merged")) + moments


def check_disk(case: dict[str, Any], variant: dict[str, Any], keep: str) -> None:
    """Raises OSError (ENOSPC) where the disk of the artifacts has less room than the case will write."""
    place = "artifacts" if os.path.isdir("artifacts") else "."
    needed, free = needed_bytes(case, variant, keep), shutil.disk_usage(place).free
    if needed > free:
        room = f"this case writes about {math.ceil(needed / 1e9)} GB, {free / 1e9:.1f} GB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {room}")
