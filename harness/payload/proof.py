"""Invariant 6: what is set up, read from the objects that will train, and where it differs from the case.

Sizes are this rank's own bytes; counts are of the whole model, shards and 4-bit packing undone.
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import torch
from torch import nn

from harness.payload.model import DTYPES, autocast, base_of, find_targets, layer_type

OPTIMIZERS = {"adamw_torch": "AdamW", "adamw_torch_fused": "AdamW", "adamw_8bit": "AdamW8bit",
              "paged_adamw_8bit": "PagedAdamW8bit"}  # fmt: skip


def examine(model: nn.Module, optimizer: Any, case: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `proof` event, `mismatches` (one sentence each) included."""
    found = {
        **_parameters(model),
        "sharding": _sharding(model),
        "kernels": _kernels(model),
        "attention": base_of(model).config._attn_implementation,
        "loss_path": _loss_path(model),
        "adapter": _adapter(model),
        "quantization": _quantization(model),
        "optimizer": _optimizer(optimizer),
        "activation_checkpointing": _checkpointing(model),
        "compute_dtype": _compute_dtype(model),
    }
    return {**found, "mismatches": _mismatches(found, model, case, variant)}


def _logical_size(module: nn.Module, name: str, parameter: torch.Tensor) -> int:
    """Elements of a parameter as the model means it, before 4-bit packing."""
    state = getattr(parameter, "quant_state", None)
    if state is None and name == "original" and hasattr(module, "0"):
        state = getattr(getattr(module, "0"), "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def _local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def _parameters(model: nn.Module) -> dict[str, Any]:
    config = base_of(model).config
    total: Counter[str] = Counter()
    trainable: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            size = _logical_size(module, name, parameter)
            kind = layer_type(f"{path}.{name}", config)
            total[kind] += size
            trainable[kind] += size if parameter.requires_grad else 0
            dtype = str(parameter.dtype).removeprefix("torch.")
            owner = "LoRA" if "lora_" in path else type(module).__name__
            stored[f"{dtype} {owner}"] += _local_bytes(parameter)
    return {
        "trainable_parameters": sum(trainable.values()),
        "total_parameters": sum(total.values()),
        "parameters_by_layer_type": dict(total),
        "trainable_by_layer_type": {kind: count for kind, count in trainable.items() if count},
        "bytes_by_dtype_and_class": dict(stored),
    }


def _sharding(model: nn.Module) -> dict[str, Any]:
    """Wrapper class, ranks, and how many of the frozen or full parameters (no adapter's) are DTensors."""
    base = [parameter for name, parameter in model.named_parameters() if "lora_" not in name]
    sharded = [parameter for parameter in base if hasattr(parameter, "to_local")]
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    classes = (type(model).__name__, type(base_of(model)).__name__)
    return {
        "wrapper": next((name for name in classes if name.startswith(("DistributedData", "FSDP"))), None),
        "world_size": ranks,
        "dtensor_parameters": len(sharded),
        "plain_parameters": len(base) - len(sharded),
        "mesh_size": sharded[0].device_mesh.size() if sharded else 1,
        "placements": sorted({str(placement) for parameter in sharded for placement in parameter.placements}),
        "fsdp_modules": sum(type(module).__name__.startswith("FSDP") for module in model.modules()),
    }


def _kernels(model: nn.Module) -> dict[str, str]:
    """Which package each Mamba function really calls: transformers falls back to torch with only a warning."""
    namespace = vars(inspect.getmodule(_own_class(base_of(model))))
    names = ("mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan", "causal_conv1d_fn")
    return {name: _package(namespace[name]) for name in names if name in namespace}


def _own_class(module: nn.Module) -> type:
    """The class of a module as it was before FSDP2 put its own in front."""
    return next(kind for kind in type(module).__mro__ if not kind.__name__.startswith("FSDP"))


def _package(function: Any) -> str:
    """The package of the implementation inside transformers' wrapper; `torch` for its own reference."""
    while callable(function):
        captured = inspect.getclosurevars(inspect.unwrap(function, stop=lambda f: _holds(f))).nonlocals
        if "implementation" not in captured:
            break
        function = captured["implementation"]
    package = str(getattr(function, "__module__", "unknown")).split(".")[0]
    return "torch" if package == "transformers" else package


def _holds(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and "implementation" in code.co_freevars


def _loss_path(model: nn.Module) -> str:
    """`trl_fused_head` where TRL patched the forward that will be called, else `full_logits`."""
    forward = base_of(model).forward
    function = getattr(forward, "__func__", forward)
    return "trl_fused_head" if function.__code__.co_name == "_fused_forward" else "full_logits"


def _adapter(model: nn.Module) -> dict[str, Any] | None:
    inner = getattr(model, "module", model)
    if not hasattr(inner, "peft_config"):
        return None
    settings = inner.peft_config["default"]
    layers = [name for name, module in inner.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)]
    return {
        "rank": settings.r,
        "alpha": settings.lora_alpha,
        "layers": len(layers),
        "targets": sorted({name.rsplit(".", 1)[-1] for name in (settings.target_modules or [])}
                          | {".".join(name.rsplit(".", 2)[-2:]) for name in settings.target_parameters or []}),
        "active": list(inner.active_adapters),
        "dtypes": sorted({str(p.dtype) for name, p in inner.named_parameters() if "lora_" in name}),
    }  # fmt: skip


def _quantization(model: nn.Module) -> dict[str, Any]:
    """Counts of 4-bit layers and parameters, and the nn.Linear modules and experts that stay in full precision."""
    base = list(base_of(model).named_modules())
    plain = {name.removesuffix(".base_layer").rsplit(".", 1)[-1] for name, module in base
             if type(module) is nn.Linear and "lora_" not in name}  # fmt: skip
    four_bit = [module for _, module in base if type(module).__name__ == "Linear4bit"]
    return {
        "linear_4bit": len(four_bit),
        "types": sorted({str(getattr(module.weight, "quant_type", None)) for module in four_bit}),
        "experts_4bit": sum(type(module).__name__ == "Bnb4bitParametrization" for _, module in base),
        "plain_linear": sorted(plain),
        "plain_experts": sum(parameter.dim() == 3 and parameter.is_floating_point() and ".experts." in f".{name}"
                             for name, parameter in base_of(model).named_parameters() if "lora_" not in name),
    }  # fmt: skip


def _optimizer(optimizer: Any) -> dict[str, Any]:
    inner = getattr(optimizer, "optimizer", optimizer)
    group = inner.param_groups[0]
    return {
        "class": type(inner).__name__,
        "module": type(inner).__module__,
        "fused": bool(group.get("fused")),
        "learning_rate": group["lr"],
        "parameters": sum(len(group["params"]) for group in inner.param_groups),
    }


def _checkpointing(model: nn.Module) -> dict[str, int]:
    """Blocks that can drop their activations, and those that do."""
    blocks = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")
              and _own_class(module).__name__ == "NemotronHBlock"]  # fmt: skip
    return {"blocks": len(blocks), "on": sum(bool(block.gradient_checkpointing) for block in blocks)}


def _compute_dtype(model: nn.Module) -> str:
    """`bf16_autocast` (accelerate wrapped the forward), `bf16_fsdp` (FSDP2 casts), else `parameters`: their own."""
    if any(hasattr(part, "_original_forward") for part in (model, getattr(model, "module", None))):
        return "bf16_autocast"
    state = model._get_fsdp_state() if hasattr(model, "_get_fsdp_state") else None
    policy = getattr(state, "_mp_policy", None)
    return "bf16_fsdp" if getattr(policy, "param_dtype", None) is torch.bfloat16 else "parameters"


def _mismatches(found: dict[str, Any], model: nn.Module, case: dict[str, Any], variant: dict[str, Any]) -> list[str]:
    checks = (_check_method, _check_quantization, _check_dtype, _check_sharding, _check_rest)
    return [sentence for check in checks for sentence in check(found, model, case, variant)]


def _check_method(found: dict[str, Any], model: nn.Module, case: dict[str, Any], _: dict[str, Any]) -> list[str]:
    adapter, wrong = found["adapter"], []
    if case["method"] == "full":
        if adapter is not None:
            wrong.append("a full fine-tune was asked, but an adapter is attached")
        if found["trainable_parameters"] != found["total_parameters"]:
            wrong.append(f"a full fine-tune was asked, but only {found['trainable_parameters']} of "
                         f"{found['total_parameters']} parameters train")  # fmt: skip
        return wrong
    if adapter is None or not adapter["layers"]:
        return [f"{case['method']} was asked, but no adapter is attached"]
    if (adapter["rank"], adapter["alpha"]) != (case["lora_rank"], case["lora_alpha"]):
        wrong.append(f"LoRA rank {case['lora_rank']} and alpha {case['lora_alpha']} were asked, "
                     f"but {adapter['rank']} and {adapter['alpha']} are set")  # fmt: skip
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if stray := [name for name in trained if "lora_" not in name]:
        wrong.append(f"only the adapter was to train, but {len(stray)} other parameters do, such as {stray[0]}")
    wrong += _check_targets(model, case, trained)
    return wrong


def _check_targets(model: nn.Module, case: dict[str, Any], trained: list[str]) -> list[str]:
    """Each target must have trainable adapter weights on it."""
    wrong = []
    base = base_of(model)
    for target in case["lora_targets"]:
        modules, parameters = find_targets(base, [target])
        paths = modules + [name.rsplit(".", 1)[0] for name in parameters]
        names = [name.replace(".base_layer", "") for name in trained]
        bare = [path for path in paths if not any(f".{path}.lora_" in name for name in names)]
        if bare:
            wrong.append(f"LoRA target `{target}` was asked, but {len(bare)} of its {len(paths)} places lack one")
    return wrong


def _check_quantization(found: dict[str, Any], _: Any, case: dict[str, Any], variant: dict[str, Any]) -> list[str]:
    state = found["quantization"]
    if case["method"] != "qlora":
        any_four_bit = state["linear_4bit"] or state["experts_4bit"]
        return [f"{case['method']} was asked, but the base is quantized to 4 bits"] if any_four_bit else []
    wrong = []
    keep = {name.rsplit(".", 1)[-1] for name in variant["keep_unquantized"]}
    if state["types"] != ["nf4"]:
        wrong.append(f"NF4 was asked, but the 4-bit layers are {state['types'] or 'missing'}")
    if stray := set(state["plain_linear"]) - keep:
        wrong.append(f"qlora was asked, but these layers are in full precision: {', '.join(sorted(stray))}")
    if state["plain_experts"]:
        wrong.append(f"qlora was asked, but {state['plain_experts']} routed experts' parameters are in full precision")
    return wrong


def _check_dtype(_: dict[str, Any], model: nn.Module, case: dict[str, Any], __: dict[str, Any]) -> list[str]:
    """Every floating parameter of the base, 4-bit values apart, has the case's dtype."""
    asked = DTYPES[case["param_dtype"]]
    other = [(name, parameter.dtype) for name, parameter in model.named_parameters()
             if "lora_" not in name and parameter.is_floating_point() and parameter.dtype != asked]  # fmt: skip
    if not other:
        return []
    name, dtype = other[0]
    return [f"parameters in {case['param_dtype']} were asked, but {len(other)} differ, such as {name} in {dtype}"]


def _check_sharding(found: dict[str, Any], _: Any, case: dict[str, Any], __: Any) -> list[str]:
    state, wrong = found["sharding"], []
    if state["world_size"] != case["devices"]:
        wrong.append(f"{case['devices']} ranks were asked, but {state['world_size']} run")
    ddp = state["wrapper"] == "DistributedDataParallel"
    if case["strategy"] == "fsdp" and (state["plain_parameters"] or state["mesh_size"] != case["devices"]):
        wrong.append(f"fsdp over {case['devices']} ranks was asked, but {state['plain_parameters']} parameters are not "
                     f"sharded and the mesh has {state['mesh_size']} ranks")  # fmt: skip
    if case["strategy"] != "fsdp" and state["dtensor_parameters"]:
        wrong.append(f"strategy {case['strategy']} was asked, but {state['dtensor_parameters']} parameters are sharded")
    if (case["strategy"] == "ddp") != ddp:
        wrong.append(f"strategy {case['strategy']} was asked, but the model is {'' if ddp else 'not '}wrapped in DDP")
    return wrong


def _check_rest(found: dict[str, Any], _: Any, case: dict[str, Any], __: Any) -> list[str]:
    wrong, optimizer, blocks = [], found["optimizer"], found["activation_checkpointing"]
    if found["attention"] != case["attention"]:
        wrong.append(f"attention {case['attention']} was asked, but {found['attention']} is set")
    fused = case["optimizer"] == "adamw_torch_fused"
    if optimizer["class"] != OPTIMIZERS[case["optimizer"]] or optimizer["fused"] != fused:
        wrong.append(f"optimizer {case['optimizer']} was asked, but {optimizer['class']} "
                     f"(fused: {optimizer['fused']}) is set")  # fmt: skip
    if not blocks["blocks"] or blocks["on"] != (blocks["blocks"] if case["activation_checkpointing"] else 0):
        asked = "on" if case["activation_checkpointing"] else "off"
        wrong.append(f"activation checkpointing {asked} was asked, but {blocks['on']} of {blocks['blocks']} have it")
    if (found["compute_dtype"] != "parameters") != autocast(case):
        asked = "bf16 mixed precision" if autocast(case) else "the parameters' own precision"
        wrong.append(f"computing in {asked} was asked, but {found['compute_dtype']} is set")
    return wrong
