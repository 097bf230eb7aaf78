"""The catalog's facts: that they load, agree with one another, and with the library that builds the models."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from harness import catalog
from harness.errors import HarnessError
from harness.schema import Method, Optimizer, Strategy

REAL = {"nano-9b-v2": 8_888_227_328, "nano-12b-v2": 12_310_001_152, "nano-30b-a3b": 31_577_937_344}
"""Parameters as published (model cards and GGUF sizes agree to the printed digits)."""

ON_META = """
import json, sys, torch
from transformers import AutoModelForCausalLM, NemotronHConfig
found = {}
for name, content in json.load(sys.stdin).items():
    config = NemotronHConfig(**content)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found[name] = {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "modules": sorted(path for path, _ in model.named_modules() if path),
        "linear": {path: [m.in_features, m.out_features] for path, m in model.named_modules()
                   if isinstance(m, torch.nn.Linear)},
        "layers": config.layers_block_type,
        "blocks": sorted({type(layer).__name__ for layer in model.model.layers}),
    }
print(json.dumps(found))
"""


def test_names_of_the_variants() -> None:
    assert set(catalog.variants()) == {
        "nano-9b-v2", "nano-12b-v2", "nano-30b-a3b", "nano-30b-a3b-base", "tiny-hybrid", "tiny-moe",
    }  # fmt: skip
    assert {name: catalog.variant(name).parameters for name in REAL} == REAL


def test_an_unknown_variant_names_the_nearest() -> None:
    with pytest.raises(HarnessError, match="did you mean nano-9b-v2") as caught:
        catalog.variant("nano-9b")
    assert "tiny-hybrid" in caught.value.hint


def test_a_variant_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        catalog.variant("nano-9b-v2").parameters = 1


@pytest.mark.parametrize(
    ("name", "layers", "limit"),
    [
        ("nano-9b-v2", {"mamba": 27, "mlp": 25, "moe": 0, "attention": 4}, 131_072),
        ("nano-12b-v2", {"mamba": 28, "mlp": 28, "moe": 0, "attention": 6}, 131_072),
        ("nano-30b-a3b", {"mamba": 23, "mlp": 0, "moe": 23, "attention": 6}, 262_144),
    ],
)
def test_layers_and_limits(name: str, layers: dict[str, int], limit: int) -> None:
    assert (catalog.variant(name).layers, catalog.variant(name).max_length) == (layers, limit)


def test_what_a_payload_gets_is_json_and_complete() -> None:
    for variant in catalog.variants().values():
        payload = variant.payload()
        assert json.loads(json.dumps(payload)) == payload
        assert set(payload) == {
            "name", "checkpoint", "revision", "config", "chat_template", "lora_targets", "keep_unquantized", "serving",
            "layers",
        }  # fmt: skip
        assert sum(variant.layers.values()) == variant.config["num_hidden_layers"]
        assert "auto_map" not in variant.config


def test_no_target_that_a_library_refuses() -> None:
    for variant in catalog.variants().values():
        names = {target.rsplit(".", 1)[-1] for target in variant.lora_targets}
        assert not names & {"gate_proj", "out_proj", "conv1d"}
        assert {"out_proj", "lm_head"} <= set(variant.keep_unquantized)
        if variant.layers["moe"]:
            assert not {"up_proj", "down_proj"} & set(variant.lora_targets)


def test_v2_is_served_with_an_fp32_mamba_cache() -> None:
    for name in ("nano-9b-v2", "nano-12b-v2"):
        serving = catalog.variant(name).serving
        assert (serving.mamba_ssm_cache_dtype, serving.mamba_ssm_cache_dtype_required) == ("float32", True)
        assert (serving.tool_parser, serving.thinking) == ("nemotron_json", "message")


def test_needs_are_those_of_the_recipe() -> None:
    needs = {name: catalog.variant(name).needs for name in REAL}
    assert [(need.gpus, need.gpu_memory_gb, need.storage_gb) for need in needs.values()] == [
        (8, 24, 20),
        (8, 40, 30),
        (8, 80, 60),
    ]
    assert all(need.source for need in needs.values())


def test_every_word_of_the_schema_has_its_facts() -> None:
    assert tuple(catalog.methods()) == get_args(Method)
    assert tuple(catalog.strategies()) == get_args(Strategy)
    assert tuple(catalog.optimizers()) == get_args(Optimizer)


@pytest.mark.parametrize(
    ("driver_name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA B200", "b200"),
        # No guess for what is like a known one and is not it.
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H20", None),
        ("", None),
    ],
)
def test_a_gpu_is_known_by_the_driver_s_name(driver_name: str, expected: str | None) -> None:
    facts = catalog.gpu(driver_name)
    assert (facts.name if facts else None) == expected


def test_gpu_facts_are_of_the_right_size_and_have_a_source() -> None:
    for facts in catalog.gpus():
        assert 1e14 < facts.bf16_flops < 1e16
        assert 5e11 < facts.memory_bytes_per_s < 1e13
        assert re.search("data sheet|white paper", facts.source)


@pytest.mark.payload
def test_the_library_builds_what_the_catalog_says(environments: Path) -> None:
    configs = {name: variant.config for name, variant in catalog.variants().items()}
    answer = subprocess.run(
        [environments / "train/bin/python", "-c", ON_META],
        input=json.dumps(configs), capture_output=True, text=True, check=True, timeout=250,
    )  # fmt: skip
    found = json.loads(answer.stdout)
    names = {"mamba": "linear_attention", "mlp": "mlp", "moe": "moe", "attention": "full_attention"}
    for name, variant in catalog.variants().items():
        seen = found[name]
        assert seen["class"] == "NemotronHForCausalLM"
        assert seen["parameters"] == variant.parameters
        assert {kind: seen["layers"].count(theirs) for kind, theirs in names.items()} == variant.layers
        for target in (*variant.lora_targets, *variant.keep_unquantized):
            assert any(path == target or path.endswith(f".{target}") for path in seen["modules"]), target
        assert seen["blocks"] == ["NemotronHBlock"]
        if name.startswith("tiny"):
            # bitsandbytes on a CPU packs 4-bit weights in blocks of 32 output features.
            assert all(size % 32 == 0 for sizes in seen["linear"].values() for size in sizes)
