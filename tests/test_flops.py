"""Floating-point operations per token: against the models' published sizes, and against what PyTorch counts."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import catalog
from harness.schema import TrainCase
from harness.summary import flops

ROOT = Path(__file__).resolve().parent.parent
DENSE = ("tiny-hybrid", "nano-9b-v2", "nano-12b-v2")
patterns = st.text("M*-E", min_size=1, max_size=40)
lengths = st.integers(8, 1 << 18)


def config(name: str = "nano-30b-a3b", **changes: Any) -> dict[str, Any]:
    """A variant's configuration; every key that any layer type needs."""
    return {**catalog.variant("nano-9b-v2").config, **catalog.variant(name).config, **changes}


def case(name: str, method: str = "lora", **changes: Any) -> TrainCase:
    targets = () if method == "full" else catalog.variant(name).lora_targets
    rank = 0 if method == "full" else 16
    fields = {"variant": name, "method": method, "seq_len": 4096, "lora_targets": targets, "lora_rank": rank, **changes}
    return TrainCase(**fields)


def met(name: str) -> int:
    """Weights in matrix products that one token meets."""
    return sum(product.parameters for product in flops.products(catalog.variant(name).config))


def without_product(name: str) -> int:
    """Parameters that are in no matrix product: embeddings, convolutions, norms, and three numbers per Mamba head."""
    shape: Any = catalog.variant(name).config
    inner = shape["mamba_num_heads"] * shape["mamba_head_dim"]
    channels = inner + 2 * shape["n_groups"] * shape["ssm_state_size"]
    mamba = channels * (shape["conv_kernel"] + 1) + 3 * shape["mamba_num_heads"] + inner
    norms = shape["hidden_size"] * (len(shape["hybrid_override_pattern"]) + 1)
    embeddings = shape["hidden_size"] * shape["vocab_size"]
    return int(catalog.variant(name).layers["mamba"] * mamba + norms + embeddings)


# ---------------------------------------------------------------- against the published sizes


@pytest.mark.parametrize("name", DENSE)
def test_every_weight_of_a_dense_model_is_met_once(name: str) -> None:
    assert met(name) + without_product(name) == catalog.variant(name).parameters


def test_a_token_meets_the_active_experts_alone() -> None:
    """3,580,073,408 active parameters: NVIDIA states 3.6 B with embeddings."""
    assert met("nano-30b-a3b") + without_product("nano-30b-a3b") == 3_580_073_408


@pytest.mark.parametrize("name", catalog.variants())
def test_without_attention_scan_and_convolution_it_is_two_for_each_weight(name: str) -> None:
    shape = catalog.variant(name).config
    rest = flops.attention_flops(shape, 4096) + flops.scan_flops(shape, 4096) + flops.convolution_flops(shape)
    assert flops.forward_flops(shape, 4096) - rest == pytest.approx(2 * met(name), rel=1e-12)


# ---------------------------------------------------------------- properties


@given(pattern=patterns, times=st.integers(1, 5), seq_len=lengths)
def test_it_is_linear_in_layers(pattern: str, times: int, seq_len: int) -> None:
    def layers(repeated: int) -> float:
        shape = config(hybrid_override_pattern=pattern * repeated)
        head: int = 2 * shape["hidden_size"] * shape["vocab_size"]
        return flops.forward_flops(shape, seq_len) - head

    assert layers(times) == pytest.approx(times * layers(1), rel=1e-9)


@given(pattern=patterns, seq_len=lengths)
def test_attention_alone_is_quadratic_in_the_sequence(pattern: str, seq_len: int) -> None:
    shape = config(hybrid_override_pattern=pattern)
    whole = [length * flops.attention_flops(shape, length) for length in (seq_len, 2 * seq_len)]
    assert whole[1] == pytest.approx(4 * whole[0])
    assert bool(whole[0]) == ("*" in pattern)
    beyond_a_chunk = max(seq_len, shape["chunk_size"])
    assert flops.scan_flops(shape, 2 * beyond_a_chunk) == flops.scan_flops(shape, beyond_a_chunk)


@given(name=st.sampled_from(list(catalog.variants())), seq_len=lengths, checkpointing=st.booleans())
def test_recomputation_is_hardware_alone_and_frozen_weights_cost_less(
    name: str, seq_len: int, checkpointing: bool
) -> None:
    shape = catalog.variant(name).config
    forward = flops.forward_flops(shape, seq_len)
    full, lora = (
        flops.training_flops(shape, case(name, method, activation_checkpointing=checkpointing), seq_len)
        for method in ("full", "lora")
    )
    assert full.model_flops_per_token == pytest.approx(3 * forward)
    assert 2 * forward < lora.model_flops_per_token
    head = 2 * int(str(shape["hidden_size"])) * int(str(shape["vocab_size"]))
    assert full.hardware_flops_per_token - full.model_flops_per_token == pytest.approx(
        forward if checkpointing else head, rel=1e-6
    )
    logits = flops.training_flops(shape, case(name, "full", activation_checkpointing=False), seq_len, fused_head=False)
    assert logits.hardware_flops_per_token == logits.model_flops_per_token


def test_quantized_weights_are_counted_as_whole_ones() -> None:
    shape = catalog.variant("nano-30b-a3b").config
    assert flops.training_flops(shape, case("nano-30b-a3b", "qlora")) == flops.training_flops(
        shape, case("nano-30b-a3b")
    )


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (("q_proj",), {"q_proj"}),
        (("up_proj",), {"shared_experts.up_proj"}),
        (("experts.up_proj",), {"experts.up_proj"}),
        (("model.layers.1.mixer.shared_experts.down_proj",), {"shared_experts.down_proj"}),
        (("lm_head",), {"lm_head"}),
        (("gate",), set()),
    ],
)
def test_an_adapter_lies_where_the_payload_puts_it(targets: tuple[str, ...], paths: set[str]) -> None:
    shape = config(hybrid_override_pattern="*E")
    wanted = sum(
        2 * 16 * (product.inputs + product.outputs) * product.times
        for product in flops.products(shape)
        if product.path.split("mixer.")[-1] in paths
    )
    assert flops.adapter_flops(shape, case("nano-30b-a3b", lora_targets=targets)) == wanted


# ---------------------------------------------------------------- against PyTorch


@pytest.mark.payload
@pytest.mark.parametrize(("name", "method"), [("tiny-hybrid", "lora"), ("tiny-moe", "lora"), ("tiny-moe", "full")])
def test_pytorch_counts_the_same_products(name: str, method: str, environments: Path, tmp_path: Path) -> None:
    """Its FlopCounterMode sees every product with a weight, forward and backward; the scan has kernels of its own."""
    tokens, variant = 128, catalog.variant(name)
    asked = case(name, method, device="cpu", param_dtype="fp32", attention="eager")
    job = {"case": asked.model_dump(mode="json"), "variant": variant.payload(), "tokens": tokens}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [environments / "train/bin/python", ROOT / "tests/fakes/count_flops.py", tmp_path / "job.json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=True)
    counted = json.loads(done.stdout.splitlines()[-1])
    frozen, adapters = 2 * met(name) * tokens, int(flops.adapter_flops(variant.config, asked)) * tokens
    assert counted["forward"]["weights"] == frozen + adapters
    assert counted["backward"]["weights"] == (2 * frozen if method == "full" else frozen + 2 * adapters)
    assert counted["backward"]["activations"] == 2 * counted["forward"]["activations"]
    assert path_by_path(counted["modules"]) == expected(name, tokens)


def path_by_path(modules: dict[str, int]) -> dict[str, int]:
    """FLOPs by module path without what PEFT puts around it, adapters left out."""
    plain = {name.removeprefix("base_model.model."): found for name, found in modules.items() if "lora_" not in name}
    return {name.removesuffix(".base_layer"): found for name, found in plain.items()}


def expected(name: str, tokens: int) -> dict[str, int]:
    """FLOPs by module path; both matrices of the routed experts together."""
    found: dict[str, int] = {}
    for product in flops.products(catalog.variant(name).config):
        path = product.path.rsplit(".", 1)[0] if ".experts." in product.path else product.path
        found[path] = found.get(path, 0) + 2 * product.parameters * tokens
    return found
