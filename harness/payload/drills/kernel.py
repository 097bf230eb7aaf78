"""A program with a kernel of its own, compiled by Triton, whose addresses run away."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from harness.payload.drills.deed import done, intend

ROWS = 1024


@triton.jit
def _doubled(values, stride, rows: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, rows)
    tl.store(values + index, 2.0 * tl.load(values + index * stride))


def illegal_access() -> None:
    """A good step, and one that reads a tensor of 4 KiB as if its rows stood 8 GiB apart."""
    intend("Triton could not compile or run a small kernel here")
    values = torch.ones(ROWS, device="cuda")
    for step, stride in ((1, 1), (2, 2**31)):
        _doubled[(1,)](values, stride, rows=ROWS)
        print(f"step {step} sum {values.sum().item():.0f}", flush=True)
        if step == 1:
            done()
