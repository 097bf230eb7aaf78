"""FSDP2 with no rank ever holding the whole model: adapter on meta weights -> shard -> fill block by block.

One way for CPUs (gloo) and GPUs (NCCL), with PyTorch's own `fully_shard`: embeddings and each block are a group that
is gathered for its forward and its backward; norm and head stay gathered in between, because TRL's fused head reads
`lm_head.weight` without calling the module. Adapters are sharded with the layers that they are on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from harness.payload import model as models
from harness.payload.weights import Saved, locate

Rows = Callable[[int, int], torch.Tensor]
"""Rows start..stop of a parameter, on any device."""


def load(case: dict[str, Any], variant: dict[str, Any], base: str | None, device: str,
         adapter: Path | None = None) -> nn.Module:  # fmt: skip
    """The sharded model with what is to be trained of it; every rank must call it.

    `base` None fills it with the random weights that `models.build` gives for the same seed, else with those saved
    there. `adapter` is a saved one to be read in place of a fresh one. At no time does a rank hold more than its own
    shards, one block, and the adapter.
    """
    with_adapter = _adapt(models.build(case, variant, "meta"), case, adapter)
    _shard(with_adapter, case, device)
    source = _drawn(case, variant, device) if base is None else _read(case, variant, base)
    for unit, rows in source:
        _fill(models.base_of(with_adapter).get_submodule(unit), rows, device, case["cpu_offload"])
        rows.clear()  # they hold the block's values, and the next block is made before this name is given anew
    left = [name for name, tensor in _tensors(with_adapter) if tensor.is_meta]
    if left:
        raise RuntimeError(f"{len(left)} tensors got no values, such as {left[0]}")
    models.base_of(with_adapter)._is_hf_initialized = True
    return with_adapter


def _adapt(model: nn.Module, case: dict[str, Any], adapter: Path | None) -> nn.Module:
    """The model with its LoRA weights on the host, where PEFT draws or reads them, and all else still on meta.

    PEFT puts an adapter where its layer is, and on meta it would lose its values; so the layers meanwhile have a single
    number for a weight, which is expanded to the weight's shape and takes no memory.
    """
    if case["method"] == "full":
        return models.adapt(model, case)
    _replace(model, lambda weight: torch.zeros((), dtype=weight.dtype).expand(weight.shape))
    if adapter is None:
        adapted = models.adapt(model, case)
    else:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True, torch_device="cpu")
    _replace(adapted, lambda weight: weight.to("meta"))
    return adapted


def _replace(model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put changed tensors in place of the base's parameters, frozen."""
    for path, module in model.named_modules():
        if "lora_" not in path:
            for name, weight in list(module.named_parameters(recurse=False)):
                if "lora_" not in name:
                    setattr(module, name, nn.Parameter(change(weight.detach()), requires_grad=False))


def _shard(model: nn.Module, case: dict[str, Any], device: str) -> None:
    mesh = init_device_mesh("cuda" if device.startswith("cuda") else "cpu", (torch.distributed.get_world_size(),))
    policies = {"mp_policy": _precision(case),
                "offload_policy": CPUOffloadPolicy() if case["cpu_offload"] else OffloadPolicy()}  # fmt: skip
    inner = models.base_of(model).model
    for unit in (inner.embeddings, *inner.layers):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, **policies)
    fully_shard(model, mesh=mesh, **policies)


def _precision(case: dict[str, Any]) -> MixedPrecisionPolicy:
    """fp32 master weights are gathered in bf16, and their gradients reduced in fp32.

    Autocast alone would keep a bf16 copy of every gathered weight that trains until the forward ends, and so the whole
    model on every rank. Adapters are small, and frozen weights are not kept.
    """
    if case["method"] == "full" and models.autocast(case):
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()


def _drawn(case: dict[str, Any], variant: dict[str, Any], device: str) -> Iterator[tuple[str, dict[str, Rows]]]:
    for name, unit in models.drawn_units(case, variant, device):
        yield name, {path: _rows_of(tensor) for path, tensor in unit.state_dict().items()}


def _rows_of(tensor: torch.Tensor) -> Rows:
    return lambda start, stop: tensor[start:stop]


def _read(case: dict[str, Any], variant: dict[str, Any], base: str) -> Iterator[tuple[str, dict[str, Rows]]]:
    """Each unit's rows as the checkpoint has them; only the rows that are asked are read from disk."""
    saved = Saved(locate(base, variant["revision"] if base == variant["checkpoint"] else None))
    plain = models.build(case, variant, "meta")
    for name, unit in models.units(plain):
        yield name, {path: _rows_in(saved, f"{name}.{path}") for path in unit.state_dict()}


def _rows_in(saved: Saved, name: str) -> Rows:
    return lambda start, stop: saved.rows(name, start, stop)


def _fill(unit: nn.Module, rows: dict[str, Rows], device: str, offloaded: bool) -> None:
    """Give this rank's shards of a unit's parameters, and its buffers as a whole, memory and values."""
    state = {}
    for name, tensor in _tensors(unit):
        if not tensor.is_meta:  # an adapter's
            continue
        source = rows[name.replace(".base_layer.", ".")]
        if isinstance(tensor, DTensor):
            # Not by DTensor.from_local, which moves to the GPU what shall stay on the host.
            state[name] = torch.empty_like(tensor, device="cpu" if offloaded else device, requires_grad=False)
            state[name].to_local().copy_(source(*_own_rows(tensor)))
        else:
            state[name] = source(0, tensor.shape[0]).to(device, tensor.dtype, copy=True)
    unit.load_state_dict(state, strict=False, assign=True)


def _own_rows(parameter: DTensor) -> tuple[int, int]:
    """The rows of a parameter that this rank holds: as `torch.chunk` cuts them, the last ranks fewer or none."""
    total = parameter.shape[0]
    each = -(-total // parameter.device_mesh.size())
    start = min(parameter.device_mesh.get_local_rank() * each, total)
    return start, min(start + each, total)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def gathered(model: nn.Module) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    """The model's tensors as wholes, unit by unit and one at a time; every rank must go through them in step."""
    for name, unit in models.units(models.base_of(model)):
        yield ((f"{name}.{path}", whole(tensor)) for path, tensor in unit.state_dict().items())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from all ranks, or as it is where it is not sharded."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.device.type != tensor.device_mesh.device_type:  # offloaded: gathered where the ranks are connected
        tensor = tensor.to(tensor.device_mesh.device_type)
    return tensor.full_tensor()
