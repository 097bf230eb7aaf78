"""Programs of one process on one GPU: memory that runs out in each phase, another process's memory, a bad index.

Memory is limited through PyTorch's own allocator; no setting of the GPU is touched and no managed memory is used.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.payload.drills.deed import done, intend

GIB = 2**30
OUT = Path("out")
DEVICE = "cuda"


def limit(gib: float) -> None:
    """Let PyTorch's allocator take `gib` in all, whatever the card has."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))


def limit_to_more(gib: float) -> None:
    """Let it take `gib` more than tensors hold now."""
    torch.cuda.empty_cache()
    limit(torch.cuda.memory_allocated() / GIB + gib)


def limit_to_peak(gib: float) -> None:
    """Let it take `gib` more than it has ever taken so far: what ran before runs again, however much that was."""
    torch.cuda.empty_cache()
    limit(torch.cuda.max_memory_reserved() / GIB + gib)


def llama(**more: Any) -> Any:
    """A Llama of about 80 million parameters, or as asked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
             "num_key_value_heads": 8, "vocab_size": 32000, "use_cache": False}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**shape, **more}))


def batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random token ids, which are their own labels."""
    ids = torch.randint(0, 32000, (rows, tokens), device=DEVICE)
    return {"input_ids": ids, "labels": ids}


class Training:
    """A model on the GPU with its optimizer."""

    def __init__(self) -> None:
        self.model = llama().to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def training_step(self, rows: int, tokens: int, between: Any = None, after: Any = None) -> float:
        """Forward, backward, optimizer step; `between` and `after` run after the first two."""
        loss = self.model(**batch(rows, tokens)).loss
        if between:
            between()
        loss.backward()
        if after:
            after()
        self.optimizer.step()
        self.optimizer.zero_grad()
        print(f"step loss {loss.item():.3f}", flush=True)
        return float(loss.item())


# ---------------------------------------------------------------- memory runs out


def load() -> None:
    """Move a model to the GPU that does not fit."""
    limit(1.0)
    layers = nn.Sequential(*(nn.utils.skip_init(nn.Linear, 8192, 8192, bias=False) for _ in range(6)))
    layers.to(DEVICE)


def load_pretrained() -> None:
    """Load a saved model that does not fit."""
    from transformers import AutoModelForCausalLM

    llama().to(torch.bfloat16).save_pretrained(OUT)
    limit(0.05)
    AutoModelForCausalLM.from_pretrained(OUT, dtype=torch.bfloat16, device_map={"": 0})


def forward() -> None:
    """A batch whose logits do not fit."""
    limit(3.0)
    running = Training()
    running.training_step(1, 128)
    running.training_step(16, 2048)


def backward() -> None:
    """The forward pass fits, the backward pass does not."""
    Training().training_step(4, 512, between=lambda: limit_to_more(0.05))


def optimizer() -> None:
    """Both passes fit, the optimizer's state does not."""
    Training().training_step(2, 128, after=lambda: limit_to_more(0.02))


def evaluate() -> None:
    """Training and the evaluation of one batch fit; evaluation that keeps all logits on the GPU does not."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": [7] * 512, "labels": [7] * 512} for _ in range(96)]
    settings = TrainingArguments(output_dir=str(OUT), max_steps=2, per_device_train_batch_size=1, report_to="none",
                                 per_device_eval_batch_size=8, save_strategy="no")  # fmt: skip
    trainer = Trainer(llama(num_hidden_layers=2), settings, train_dataset=rows, compute_metrics=lambda _: {})
    intend("training or the evaluation of one batch failed")
    trainer.train()
    trainer.evaluate(rows[:8])
    limit_to_peak(0.1)
    done()
    trainer.evaluate(rows)


def save() -> None:
    """Training fits; a copy of the weights made for saving does not."""
    running = Training()
    running.training_step(1, 128)
    limit_to_more(0.02)
    save_checkpoint(running.model)


def save_checkpoint(model: nn.Module) -> None:
    """Save a copy in another dtype."""
    OUT.mkdir(exist_ok=True)
    torch.save({name: value.to(torch.float64) for name, value in model.state_dict().items()}, OUT / "model.pt")


def fragments() -> None:
    """Memory in pieces, of which none is large enough for one large block."""
    limit(4.0)
    pieces = [torch.empty(5 * 2**20, dtype=torch.uint8, device=DEVICE) for _ in range(660)]
    kept = pieces[::2]  # four share a segment of the allocator, so that none of these can be given back
    del pieces
    _Large()(kept[0])


class _Large(nn.Module):
    """A layer that needs one block of 2 GiB."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A large result."""
        return torch.empty(2 * GIB, dtype=torch.uint8, device=x.device)


# ---------------------------------------------------------------- another process


def hold() -> None:
    """Take all free memory but 2 GiB, say so, and keep it until standard input closes."""
    free, _ = torch.cuda.mem_get_info()
    block = torch.empty(max(0, free - 2 * GIB), dtype=torch.uint8, device=DEVICE)
    block[:1] = 1
    torch.cuda.synchronize()
    print("holding", flush=True)
    sys.stdin.read()


def crowded() -> None:
    """Train a model that any card of this size has room for."""
    running = Training()
    running.training_step(1, 128)
    running.training_step(8, 2048)


# ---------------------------------------------------------------- errors of kernels and the driver


def bad_index() -> None:
    """A token id outside the vocabulary."""
    model = llama(num_hidden_layers=1).to(DEVICE)
    ids = torch.randint(0, 32000, (2, 64), device=DEVICE)
    print(f"step 1 loss {model(input_ids=ids, labels=ids).loss.item():.3f}", flush=True)
    ids[0, 0] = 32_005
    print(f"step 2 loss {model(input_ids=ids, labels=ids.clamp(max=31_999)).loss.item():.3f}", flush=True)


def after_fork() -> None:
    """Use the GPU, fork, and use it again."""
    import multiprocessing

    torch.zeros(8, device=DEVICE)
    child = multiprocessing.get_context("fork").Process(target=_use)
    child.start()
    child.join()
    sys.exit(child.exitcode)


def _use() -> None:
    torch.zeros(8, device=DEVICE)


# ---------------------------------------------------------------- nothing is wrong


def healthy() -> None:
    """Train, evaluate and end well."""
    running = Training()
    for _ in range(3):
        running.training_step(1, 128)
    print("training finished", flush=True)
