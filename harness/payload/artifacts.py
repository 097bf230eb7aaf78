"""What a training case leaves on disk: a base, a checkpoint that is read back, an adapter, a merged model."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from harness.payload import model as models
from harness.payload import weights
from harness.payload.meter import MemoryMeter

ARTIFACTS = Path("artifacts")
BASE = ARTIFACTS / "base"
COMPARED_TOKENS = 64
"""Length of the one batch whose logits are compared after reloading."""
TOLERANCE = {"fp32": 1e-4, "bf16": 6e-2}
"""Largest difference of a logit after reloading. Equal weights on one rank give 0; a sharded or mixed-precision run
computes in another order, which moves a logit of magnitude 1 by a few units in the last place of its dtype."""


def misplaced(case: dict[str, Any]) -> list[str]:
    """What is wrong with the place of the artifacts, a sentence each."""
    if case["checkpoints"] == "run":
        return []
    apart = ARTIFACTS.is_dir() and ARTIFACTS.stat().st_dev != Path().stat().st_dev
    return [] if apart else ["checkpoints: local was asked for, and artifacts lie on the run directory's file system"]


def save_base(case: dict[str, Any], variant: dict[str, Any], tokenizer: Any, device: str) -> None:
    """Save the random weights that both training and serving start from, part by part, with their tokenizer."""
    drawn = models.drawn_units(case, variant, device)
    weights.write(BASE, (((f"{name}.{path}", tensor) for path, tensor in unit.state_dict().items())
                         for name, unit in drawn))  # fmt: skip
    GenerationConfig.from_model_config(models.config(case, variant)).save_pretrained(BASE)
    tokenizer.save_pretrained(BASE)
    write_config(BASE, variant, case["param_dtype"])


def write_config(directory: Path, variant: dict[str, Any], param_dtype: str) -> None:
    """Spell config.json as the hub does, which both transformers and vLLM read whatever their version."""
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[param_dtype]
    content = {**variant["config"], "architectures": ["NemotronHForCausalLM"], "torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def logits(model: Any, rows: list[list[int]], case: dict[str, Any], device: str) -> torch.Tensor:
    """Logits of the last positions of one row, fp32 on the CPU, in evaluation mode and the precision of training."""
    model.eval()
    ids = torch.tensor([rows[0][:COMPARED_TOKENS]], device=device)
    precision = torch.autocast(case["device"], torch.bfloat16, enabled=models.autocast(case))
    with torch.no_grad(), precision:
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return found.logits[:, -8:].float().cpu()


def reload(case: dict[str, Any], variant: dict[str, Any], base: str | None, saved: Path, device: str) -> Any:
    """The model as the checkpoint in `saved` gives it, on a base built or loaded anew (`base` None: built); sharded
    again, by all ranks together, where it was."""
    full = case["method"] == "full"
    if case["strategy"] == "fsdp":
        from harness.payload import shard

        return shard.load(case, variant, str(saved) if full else base, device, None if full else saved)
    if full:
        return models.load(case, variant, str(saved), device)
    from peft import PeftModel

    fresh = models.build(case, variant, device) if base is None else models.load(case, variant, base, device)
    adapted = PeftModel.from_pretrained(fresh, saved)
    dtype = _saved_dtype(saved / "adapter_model.safetensors")
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # PEFT loads into fp32, TRL trains qlora's adapter in bf16
            parameter.data = parameter.data.to(dtype)
    return adapted


def _saved_dtype(path: Path) -> torch.dtype:
    """The dtype of a safetensors file's tensors, by its first."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        return tensors.get_tensor(next(iter(tensors.keys()))).dtype


def check_files(case: dict[str, Any], saved: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, bool]:
    """Are the checkpoint's files there, and do its tensors have the shapes that were trained."""
    from safetensors import safe_open

    weights = sorted(saved.glob("*.safetensors"))
    found: dict[str, tuple[int, ...]] = {}
    for path in weights:
        with safe_open(path, framework="pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    settings = "config.json" if case["method"] == "full" else "adapter_config.json"
    names = (settings, "tokenizer.json", "tokenizer_config.json")
    same = sorted(found.values()) == sorted(shapes.values())
    if case["method"] == "full":  # a checkpoint has the hub's layout: experts one by one, counted together here
        same = sum(map(math.prod, found.values())) == sum(map(math.prod, shapes.values()))
    return {"files": bool(weights) and all((saved / name).is_file() for name in names), "shapes": same}


def check_tokenizer(tokenizer: Any, saved: Path, texts: list[str]) -> bool:
    """Does the saved tokenizer give the same ids and the same chat template."""
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(saved)
    same_ids = all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in texts)
    return same_ids and again.chat_template == tokenizer.chat_template and len(again) == len(tokenizer)


def trained_shapes(model: Any, case: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Whole shapes of the tensors that a checkpoint must hold."""
    if case["method"] == "full":
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if "lora_" in name}


def consolidate(model: Any, tokenizer: Any, saved: Path, rank: int) -> None:
    """Write what was trained of a sharded model as whole tensors, by rank 0; every rank must call it.

    A full fine-tune is gathered tensor by tensor and written block by block: nobody holds it whole.
    """
    from harness.payload import shard

    first = rank == 0
    if hasattr(model, "peft_config"):
        adapter = ((name, shard.whole(parameter)) for name, parameter in model.named_parameters() if "lora_" in name)
        state = {name: tensor.cpu() for name, tensor in adapter if first}
        if first:
            model.save_pretrained(saved, state_dict=state)
    else:
        weights.write(saved, shard.gathered(model), writes=first)
        if first:
            model.config.save_pretrained(saved)
            model.generation_config.save_pretrained(saved)
    if first:
        tokenizer.save_pretrained(saved)
    torch.distributed.barrier()


def keep_adapter(saved: Path, tokenizer: Any) -> Path:
    """Copy the adapter out of the checkpoint, as PEFT and vLLM read it."""
    target = ARTIFACTS / "adapter"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(saved / name, target / name)
    tokenizer.save_pretrained(target)
    return target


def merge(case: dict[str, Any], variant: dict[str, Any], base: str | None, saved: Path, tokenizer: Any,
          memory: MemoryMeter) -> dict[str, Any]:  # fmt: skip
    """Merge the adapter into its unquantized base on the host, or copy a full fine-tune; fields of a `merge` event."""
    from harness.payload.meter import rss_bytes

    memory.restart()
    began = time.monotonic()
    target = ARTIFACTS / "merged"
    plain = {**case, "strategy": "none", "method": "lora" if case["method"] == "qlora" else case["method"]}
    merged = reload(plain, variant, base, saved, "cpu")
    if case["method"] != "full":
        merged = merged.merge_and_unload()
    merged.save_pretrained(target)
    tokenizer.save_pretrained(target)
    write_config(target, variant, case["param_dtype"])
    peak = rss_bytes("VmHWM")
    memory.record("merge")
    return {"duration_s": time.monotonic() - began, "peak_rss_bytes": peak, "path": str(target)}
