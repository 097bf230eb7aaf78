"""A case's model, optimizer and loss on a device (meta included): no Trainer, no files written.

`case` and `variant` are the plain JSON objects of job.json. Random weights are drawn block by block from the model's
own init distribution, so that a quantized model never needs more memory than its largest block in full precision.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import NemotronHConfig, NemotronHForCausalLM, set_seed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EXPERT_PARAMETERS = ("up_proj", "down_proj")
"""The routed experts' 3-D parameters in transformers' `NemotronHExperts`: no nn.Linear, so bitsandbytes skips them."""


class TargetError(ValueError):
    """A LoRA target that matches nothing."""


def config(case: dict[str, Any], variant: dict[str, Any]) -> NemotronHConfig:
    """The variant's transformers config with the case's attention."""
    found = NemotronHConfig(**variant["config"])
    found._attn_implementation = case["attention"]
    found.use_cache = False
    return found


def autocast(case: dict[str, Any]) -> bool:
    """Is bf16 mixed precision on: where fp32 values train (LoRA's own, or master weights) and bf16 is to be computed.

    A CPU case in fp32 computes in fp32.
    """
    trains_fp32 = case["method"] != "full" or case["param_dtype"] == "fp32"
    return trains_fp32 and (case["device"] == "cuda" or case["param_dtype"] == "bf16")


def build(case: dict[str, Any], variant: dict[str, Any], device: str, quantize: bool | None = None) -> nn.Module:
    """The model with random weights on `device`; on `meta` shapes alone, not quantized.

    `quantize` defaults to the case's method being qlora.
    """
    with torch.device("meta"):
        model = NemotronHForCausalLM._from_config(config(case, variant), dtype=DTYPES[case["param_dtype"]])
    _keep_strict_fp32(model)
    if device == "meta":
        return model
    quantize = case["method"] == "qlora" if quantize is None else quantize
    if quantize:
        _mark_quantized(model, case, variant)
    set_seed(case["seed"])
    for _, unit in units(model):
        _fill(model, unit, device)
        if quantize:
            _quantize_experts(unit)
    model._is_hf_initialized = True
    return model


def drawn_units(case: dict[str, Any], variant: dict[str, Any], device: str) -> Iterator[tuple[str, nn.Module]]:
    """The parts of the model that `build` gives, unquantized, with their names, one at a time: each loses its values
    when the next is asked for."""
    model = build(case, variant, "meta")
    set_seed(case["seed"])
    for name, unit in units(model):
        _fill(model, unit, device)
        yield name, unit
        unit.to("meta")


def load(case: dict[str, Any], variant: dict[str, Any], path: str, device: str) -> nn.Module:
    """The whole model with the weights saved at `path` (a directory or a hub id), quantized where the case asks."""
    arguments: dict[str, Any] = {"dtype": DTYPES[case["param_dtype"]], "attn_implementation": case["attention"]}
    if case["method"] == "qlora":
        arguments["quantization_config"] = _nf4(case, variant)
    arguments["device_map"] = {"": device}
    revision = variant["revision"] if path == variant["checkpoint"] else None
    model = NemotronHForCausalLM.from_pretrained(path, revision=revision, **arguments)
    model.config.use_cache = False
    if case["method"] == "qlora":
        _quantize_experts(model)
    return model


def _keep_strict_fp32(model: nn.Module) -> None:
    """Keep in fp32 what `from_pretrained` keeps so (the router's correction bias)."""
    strict = model._keep_in_fp32_modules_strict
    for module in model.modules():
        for name in strict:
            if isinstance(tensor := getattr(module, name, None), torch.Tensor):
                tensor.data = tensor.data.float()


def units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts that are filled one after the other, by name: embeddings, each block, the last norm, the head."""
    for name, child in model.model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"model.{name}.{number}", block) for number, block in child.named_children())
        else:
            yield f"model.{name}", child
    yield "lm_head", model.lm_head


def _fill(model: nn.Module, unit: nn.Module, device: str) -> None:
    """Give `unit` memory on `device` and values from the model's own init, then quantize its 4-bit layers."""
    from_meta = [module for module in unit.modules() if type(module).__name__ == "Linear4bit"]
    for module in from_meta:
        empty = torch.empty(module.weight.shape, dtype=model.config.dtype, device=device)
        module.weight = nn.Parameter(empty, requires_grad=False)
    unit.to_empty(device=device)
    with torch.no_grad():
        unit.apply(model._init_weights)
    for module in from_meta:
        _quantize_linear(module, device)


def _nf4(case: dict[str, Any], variant: dict[str, Any]) -> Any:
    """NF4 with double quantization for every nn.Linear but those the fused kernels or TRL's head read directly."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[case["param_dtype"]],
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=list(variant["keep_unquantized"]),
    )


def _mark_quantized(model: nn.Module, case: dict[str, Any], variant: dict[str, Any]) -> None:
    """Put 4-bit layers in place of nn.Linear, still without values, as `from_pretrained` does before it loads."""
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = _nf4(case, variant)
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=DTYPES[case["param_dtype"]], device_map=None)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def _quantize_linear(module: nn.Module, device: str) -> None:
    """Quantize the values of a bitsandbytes Linear4bit, which happens on moving its weight to a device."""
    from bitsandbytes.nn import Params4bit

    module.weight = Params4bit(
        module.weight.data,
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=torch.uint8,
        module=module,
    ).to(device)


def _quantize_experts(unit: nn.Module) -> None:
    """Quantize the routed experts' 3-D parameters in place, which `load_in_4bit` leaves in full precision."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for module in list(unit.modules()):
        if type(module).__name__ == "NemotronHExperts":
            for name in EXPERT_PARAMETERS:
                replace_parameter_4bit(module, name, compress_statistics=True, quant_type="nf4")


def find_targets(model: nn.Module, targets: list[str]) -> tuple[list[str], list[str]]:
    """Full names of the nn.Linear modules, and of the 3-D parameters, that the LoRA targets stand for.

    A target is a module's name or the end of its path. Routed experts are parameters, not modules: only a target with
    a dot, such as `experts.up_proj`, reaches them. Full names keep PEFT from matching bitsandbytes' parametrizations.
    Raises TargetError for each target that matches nothing, naming what exists.
    """
    linears, experts = _layers(model)
    modules: list[str] = []
    parameters: list[str] = []
    for target in targets:
        hit = [name for name in linears if _stands_for(target, name)]
        hit_parameters = [name for name in experts if "." in target and _stands_for(target, name)]
        if not hit and not hit_parameters:
            raise TargetError(_no_such_target(target, linears, experts))
        modules += [name for name in hit if name not in modules]
        parameters += [name for name in hit_parameters if name not in parameters]
    return modules, parameters


def _layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the nn.Linear modules and of the experts' parameters, as they are without an adapter."""
    plain = [(name.replace(".base_layer", ""), module) for name, module in model.named_modules() if "lora_" not in name]
    linears = [name for name, module in plain if isinstance(module, nn.Linear)]
    experts = [name for name, module in plain if type(module).__name__.endswith("NemotronHExperts")]
    return linears, [f"{name}.{weight}" for name in experts for weight in EXPERT_PARAMETERS]


def _stands_for(target: str, name: str) -> bool:
    return name == target or name.endswith("." + target)


def _no_such_target(target: str, linears: list[str], experts: list[str]) -> str:
    names = sorted({name.rsplit(".", 1)[-1] for name in linears})
    names += sorted({".".join(name.rsplit(".", 2)[-2:]) for name in experts})
    return f"LoRA target `{target}` matches nothing in this model. Modules that exist: {', '.join(names)}"


def adapt(model: nn.Module, case: dict[str, Any]) -> nn.Module:
    """The model with a trainable LoRA adapter, or, for a full fine-tune, the model itself with all its parameters."""
    if case["method"] == "full":
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    modules, parameters = find_targets(model, case["lora_targets"])
    if parameters and case["method"] == "qlora":
        raise TargetError(f"LoRA on routed experts in 4 bits is not possible with PEFT: leave out {parameters[0]}")
    settings = LoraConfig(
        r=case["lora_rank"],
        lora_alpha=case["lora_alpha"],
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=modules or "^$",
        target_parameters=parameters or None,
    )
    set_seed(case["seed"])
    return get_peft_model(model, settings)


def optimizer(model: nn.Module, case: dict[str, Any]) -> torch.optim.Optimizer:
    """The case's optimizer over the trainable parameters; no weight decay, PyTorch's default betas and epsilon."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    name, rate = case["optimizer"], case["learning_rate"]
    if name.startswith("adamw_torch"):
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=name == "adamw_torch_fused")
    import bitsandbytes

    kind = bitsandbytes.optim.PagedAdamW8bit if name == "paged_adamw_8bit" else bitsandbytes.optim.AdamW8bit
    return kind(parameters, lr=rate, weight_decay=0.0)


def add_loss_head(model: nn.Module) -> None:
    """Patch the model with TRL's fused head, as `SFTTrainer` does: the loss without the full logits."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(base_of(model), outputs=("log_probs",))


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean negative log-likelihood of a batch (input_ids, attention_mask, labels), a scalar; after `add_loss_head`."""
    outputs = model(**batch, use_cache=False, fused_lm_head=True)
    return -outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1)


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers (DDP) and adapters (PEFT)."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def layer_type(name: str, model_config: Any) -> str:
    """What a parameter of that name belongs to: mamba, mlp, moe, attention, embeddings, head or norm."""
    if match := re.search(r"\blayers\.(\d+)\.", name):
        return LAYER_TYPES.get(model_config.layers_block_type[int(match[1])], "other")
    return "embeddings" if "embeddings" in name else "head" if "lm_head" in name else "norm"


LAYER_TYPES = {"linear_attention": "mamba", "mamba": "mamba", "full_attention": "attention", "attention": "attention",
               "mlp": "mlp", "moe": "moe"}  # fmt: skip
"""transformers' names of block types, of 5.23 and of earlier versions."""
