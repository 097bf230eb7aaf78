"""Counts what PyTorch really multiplies: `python count_flops.py JOB.json` prints FLOPs by module path, as JSON.

Runs in the training environment; the job holds `case`, `variant` and `tokens`. One forward and backward of a batch of
one sequence, with a plain loss over the logits and no checkpointing.
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.payload import model as models

job = json.loads(Path(sys.argv[1]).read_text())
case, variant = job["case"], job["variant"]
model = models.build(case, variant, "cpu")
model.config._experts_implementation = "eager"
model = models.adapt(model, case)
model.train()
# As with checkpointing and PEFT: the gradient flows down to the embeddings.
models.base_of(model).enable_input_require_grads()
tokens = torch.randint(3, variant["config"]["vocab_size"], (1, job["tokens"]))


def linear_flops(counter: FlopCounterMode) -> dict[str, int]:
    """Of the modules that hold one weight matrix, and of the experts and routers."""
    wanted = {name for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) or type(module).__name__.startswith("NemotronHTopk")
              or type(module).__name__ == "NemotronHExperts"}  # fmt: skip
    root = type(model).__name__
    return {name: sum(found.values()) for path, found in counter.get_flop_counts().items()
            if (name := path.removeprefix(f"{root}.")) in wanted}  # fmt: skip


def by_operation(counter: FlopCounterMode) -> dict[str, int]:
    """`weights`: products of two matrices; `activations`: of batches of them, in attention and the reference scan."""
    found = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    names = {"weights": ("aten.mm", "aten.addmm"), "activations": ("aten.bmm", "aten.baddbmm")}
    return {what: sum(found.get(name, 0) for name in operations) for what, operations in names.items()}


with FlopCounterMode(display=False) as forward:
    loss = model(input_ids=tokens, use_cache=False).logits.float().mean()
with FlopCounterMode(display=False) as backward:
    loss.backward()
print(json.dumps({"modules": linear_flops(forward), "forward": by_operation(forward),
                  "backward": by_operation(backward)}))  # fmt: skip
