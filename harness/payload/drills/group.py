"""Several ranks in one process group, over gloo on CPUs or NCCL on GPUs, of which one or all go wrong."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 8
AT = 4
"""The step in which it happens: after a warm-up of the communicator, without which a wait counts as set-up."""
LIMIT_S = 6.0
"""Time limit of a collective."""
LONG_S = 600.0
"""Longer than any limit here."""


def join(limit_s: float = LIMIT_S) -> tuple[int, torch.device]:
    """Join the process group; this rank and its device."""
    device = torch.device("cpu")
    if os.environ.get("DRILL_DEVICE") == "cuda":
        index = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=timedelta(seconds=limit_s))
    return dist.get_rank(), device


Hook = Callable[[int, int, torch.Tensor], None]


def train(hook: Hook | None = None, limit_s: float = LIMIT_S, all_speak: bool = False, steps: int = STEPS) -> Any:
    """Train a small model under DDP; `hook` gets step, rank and batch before each step. Returns the model."""
    rank, device = join(limit_s)
    torch.manual_seed(rank)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1)).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        batch = torch.randn(16, 32, device=device)
        if hook:
            hook(step, rank, batch)
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 or all_speak:
            print(f"[rank{rank}] step {step}/{steps} loss {loss.item():.4f}" if all_speak else
                  f"step {step}/{steps} loss {loss.item():.4f}", flush=True)  # fmt: skip
    return model


def finish() -> None:
    """The end of a good run."""
    dist.barrier()
    if dist.get_rank() == 0:
        print("training finished", flush=True)
    dist.destroy_process_group()


# ---------------------------------------------------------------- one rank goes away


def killed() -> None:
    """Rank 1 kills itself."""
    train(lambda step, rank, _: os.kill(os.getpid(), signal.SIGKILL) if (step, rank) == (AT, 1) else None)


def crashed() -> None:
    """Rank 1 reads address 0."""

    def crash(step: int, rank: int, _: torch.Tensor) -> None:
        if (step, rank) == (AT, 1):
            ctypes.string_at(0)

    train(crash)


def leaves() -> None:
    """Rank 1 leaves the loop before the others and ends as if all were done."""

    def leave(step: int, rank: int, _: torch.Tensor) -> None:
        if (step, rank) == (AT, 1):
            os._exit(0)

    train(leave)


def owner_leaves() -> None:
    """Rank 0, which also keeps the store, goes while the others wait in a barrier."""
    rank, device = join()
    work = torch.ones(8, device=device)
    for _ in range(AT):
        dist.all_reduce(work)
    print(f"[rank{rank}] warm-up done", flush=True)
    if rank == 0:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def raises() -> None:
    """An assertion fails on rank 1's batch."""

    def check(step: int, rank: int, batch: torch.Tensor) -> None:
        assert (step, rank) != (AT, 1), f"batch {step} has {len(batch)} rows with labels outside the classes"

    train(check)


def all_raise() -> None:
    """The same mistake in the program of every rank."""

    def mistake(step: int, rank: int, batch: torch.Tensor) -> None:
        if step == AT:
            batch.nonexistent_operation()

    train(mistake)


def host_memory() -> None:
    """Rank 1 may not take more address space than it has plus 1 GiB, and asks for 4."""

    def ask(step: int, rank: int, _: torch.Tensor) -> None:
        if (step, rank) == (AT, 1):
            with open("/proc/self/statm") as sizes:
                now = int(sizes.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, now + 2**30))
            torch.ones(2**30, dtype=torch.float32)

    train(ask)


def host_memory_python() -> None:
    """As `host_memory`, but Python's own objects ask."""

    def ask(step: int, rank: int, _: torch.Tensor) -> None:
        if (step, rank) == (AT, 1):
            with open("/proc/self/statm") as sizes:
                now = int(sizes.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, now + 2**28))
            bytearray(2**30)

    train(ask)


# ---------------------------------------------------------------- one rank is late or asks for something else


def late() -> None:
    """Rank 1 sleeps in a step for longer than the others wait."""
    train(lambda step, rank, _: time.sleep(LONG_S) if (step, rank) == (AT, 1) else None)


def late_in_save() -> None:
    """Rank 0 hangs while it saves; the others wait for it in a barrier."""

    def save(step: int, rank: int, _: torch.Tensor) -> None:
        if step != AT:
            return
        if rank == 0:
            print(f"Saving model checkpoint to out/checkpoint-{step}", flush=True)
            time.sleep(LONG_S)
        dist.barrier()

    train(save)


def barred() -> None:
    """Rank 1 does not come to a monitored barrier."""
    rank, _ = join()
    dist.barrier()
    if rank == 1:
        time.sleep(LONG_S)
    dist.monitored_barrier(timeout=timedelta(seconds=4))


def other_operation() -> None:
    """Rank 1 broadcasts where rank 0 reduces."""
    rank, device = join()
    work = torch.ones(1024, device=device)
    for step in range(1, STEPS + 1):
        if step == AT and rank == 1:
            dist.broadcast(work, src=0)
        else:
            dist.all_reduce(work)
        work.cpu()
        if rank == 0:
            print(f"step {step}/{STEPS}", flush=True)
    finish()


def other_size() -> None:
    """Rank 1 reduces a longer tensor than rank 0."""
    rank, device = join()
    for step in range(1, STEPS + 1):
        work = torch.ones(2048 if (step, rank) == (AT, 1) else 1024, device=device)
        dist.all_reduce(work)
        work.cpu()
        if rank == 0:
            print(f"step {step}/{STEPS}", flush=True)
    finish()


def other_model() -> None:
    """Rank 1 builds a model with another layer."""
    rank, device = join()
    layers = [nn.Linear(32, 32), nn.Linear(32, 32 + rank)]
    DistributedDataParallel(nn.Sequential(*layers).to(device))


def one_short_of_memory() -> None:
    """Rank 1's allocator is capped, and one step asks for more."""
    extra = []

    def ask(step: int, rank: int, batch: torch.Tensor) -> None:
        if (step, rank) == (AT, 1):
            total = torch.cuda.get_device_properties(batch.device).total_memory
            torch.cuda.set_per_process_memory_fraction(2**30 / total, batch.device)
            extra.append(_Widen()(batch))

    train(ask)


class _Widen(nn.Module):
    """A layer whose activations take 4 GiB."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """The batch, many times over."""
        return batch.repeat(1, 2**26 // batch.shape[0])


# ---------------------------------------------------------------- numbers


def poisoned() -> None:
    """Rank 1's batch holds an infinity from one step on."""

    def poison(step: int, rank: int, batch: torch.Tensor) -> None:
        if step >= AT and rank == 1:
            batch[0, 0] = torch.inf

    train(poison, all_speak=True)


# ---------------------------------------------------------------- the ranks do not meet


def alone() -> None:
    """A rank whose master answers nowhere."""
    os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="9")
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))


def meets() -> None:
    """Join, reduce once, leave: fails where the network or the launcher does."""
    _, device = join()
    dist.all_reduce(torch.ones(8, device=device))
    finish()


def same_gpu() -> None:
    """Both ranks take the first GPU."""
    os.environ["LOCAL_RANK"] = "0"
    meets()


# ---------------------------------------------------------------- sharding


def mixed_dtypes() -> None:
    """FSDP over parameters of two dtypes in one unit."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    _, device = join()
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).to(torch.bfloat16))
    FullyShardedDataParallel(layers, device_id=device)


def frozen() -> None:
    """Everything is frozen, and the loss is asked for its gradient."""
    _, device = join()
    model = nn.Linear(32, 1).to(device).requires_grad_(False)
    model(torch.randn(4, 32, device=device)).mean().backward()


def odd_mesh() -> None:
    """A mesh of three by the ranks that there are."""
    from torch.distributed.device_mesh import init_device_mesh

    _, device = join()
    init_device_mesh(device.type, (3, 2))


# ---------------------------------------------------------------- nothing is wrong


def healthy() -> None:
    """A run that ends well."""
    train()
    finish()


def healthy_speaking() -> None:
    """Every rank prints."""
    train(all_speak=True)
    finish()


def healthy_rude() -> None:
    """The process group is left standing, which PyTorch warns about."""
    model = train()
    if dist.get_rank() == 0:
        print(f"training complete: {sum(one.numel() for one in model.parameters())} parameters", flush=True)


def healthy_slow_rank() -> None:
    """Rank 1 is slower in every step, within the limit."""
    train(lambda step, rank, _: time.sleep(0.7 * rank), all_speak=True)
    finish()
