"""Floating-point operations per token of a hybrid model: Mamba-2, attention, MLP, experts, head. Pure.

A multiply and an add count as two. Counted are matrix products, the convolution and the products of the state-space
scan; left out, as in the sources below, are norms, activations, softmax, the optimizer and the embedding's look-up.
`model` FLOPs are what the mathematics of the training method needs and nothing more: the numerator of the MFU as
PaLM defines it (Chowdhery et al. 2022, appendix B: no recomputation). `hardware` FLOPs add what is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pydantic import JsonValue

from harness.schema import Frozen, TrainCase

Config = Mapping[str, JsonValue]
"""The content of a `nemotron_h` config.json."""


class Product(NamedTuple):
    """One weight matrix that every token is multiplied with."""

    path: str
    """Module path as in transformers, for LoRA targets."""
    inputs: int
    outputs: int
    times: int = 1
    """How often per token: the number of active experts."""

    @property
    def parameters(self) -> int:
        """Weights that one token meets."""
        return self.inputs * self.outputs * self.times


class TrainingFlops(Frozen):
    """Per token of one training step, forward and backward."""

    model_flops_per_token: float
    hardware_flops_per_token: float


def _int(config: Config, key: str) -> int:
    return int(str(config[key]))


def _mamba_sizes(config: Config) -> tuple[int, int]:
    """Inner width, and channels of the convolution: the inner width and B and C of every group."""
    inner = _int(config, "mamba_num_heads") * _int(config, "mamba_head_dim")
    return inner, inner + 2 * _int(config, "n_groups") * _int(config, "ssm_state_size")


# ---------------------------------------------------------------- weights


def products(config: Config) -> Iterator[Product]:
    """Every weight matrix on a token's way, in order, the head last; shapes as in transformers' modeling_nemotron_h."""
    kinds = {"M": _mamba, "*": _attention, "-": _mlp, "E": _moe}
    for index, letter in enumerate(str(config["hybrid_override_pattern"])):
        yield from kinds[letter](config, f"model.layers.{index}.mixer")
    yield Product("lm_head", _int(config, "hidden_size"), _int(config, "vocab_size"))


def _mamba(config: Config, path: str) -> Iterator[Product]:
    """in_proj makes gate, x, B, C and one time step per head; out_proj leads back (Dao and Gu 2024, Mamba-2)."""
    hidden, (inner, channels) = _int(config, "hidden_size"), _mamba_sizes(config)
    yield Product(f"{path}.in_proj", hidden, inner + channels + _int(config, "mamba_num_heads"))
    yield Product(f"{path}.out_proj", inner, hidden)


def _attention(config: Config, path: str) -> Iterator[Product]:
    """Grouped-query attention: keys and values have fewer heads than queries."""
    hidden, width = _int(config, "hidden_size"), _int(config, "head_dim")
    queries, shared = _int(config, "num_attention_heads") * width, _int(config, "num_key_value_heads") * width
    yield Product(f"{path}.q_proj", hidden, queries)
    yield Product(f"{path}.k_proj", hidden, shared)
    yield Product(f"{path}.v_proj", hidden, shared)
    yield Product(f"{path}.o_proj", queries, hidden)


def _mlp(config: Config, path: str) -> Iterator[Product]:
    """Two matrices: relu2 without a gate."""
    hidden, inner = _int(config, "hidden_size"), _int(config, "intermediate_size")
    yield Product(f"{path}.up_proj", hidden, inner)
    yield Product(f"{path}.down_proj", inner, hidden)


def _moe(config: Config, path: str) -> Iterator[Product]:
    """The router, the experts that a token is sent to, and the shared one, all without a gate."""
    hidden, active = _int(config, "hidden_size"), _int(config, "num_experts_per_tok")
    routed, shared = _int(config, "moe_intermediate_size"), _int(config, "moe_shared_expert_intermediate_size")
    yield Product(f"{path}.gate", hidden, _int(config, "n_routed_experts"))
    yield Product(f"{path}.experts.up_proj", hidden, routed, active)
    yield Product(f"{path}.experts.down_proj", routed, hidden, active)
    yield Product(f"{path}.shared_experts.up_proj", hidden, shared)
    yield Product(f"{path}.shared_experts.down_proj", shared, hidden)


# ---------------------------------------------------------------- without weights


def attention_flops(config: Config, seq_len: int) -> float:
    """Scores and their product with the values, forward, per token, of the attention layers alone.

    2 x 2 x heads x head_dim x seq_len / 2: a causal token sees half of the sequence on average (Megatron-LM,
    training.py, num_floating_point_operations, attn_layer_flops).
    """
    width = _int(config, "num_attention_heads") * _int(config, "head_dim")
    return str(config["hybrid_override_pattern"]).count("*") * 2 * width * float(seq_len)


def scan_flops(config: Config, seq_len: int) -> float:
    """The chunked state-space scan of all Mamba-2 layers, forward, per token.

    With chunks of Q tokens, state N, G groups, heads of together D channels, per token: scores C B^T within the chunk
    2 Q N G; scores times x 2 Q D; the chunk's state from B and x 2 N D; output from the state 2 N D; the state carried
    from chunk to chunk 2 N D / Q. Source: Dao and Gu 2024, "Transformers are SSMs", section 6 and listing 1; mamba-ssm,
    ops/triton/ssd_combined.py, whose scores are made of whole chunks. A sequence shorter than a chunk is one.
    """
    state, groups = _int(config, "ssm_state_size"), _int(config, "n_groups")
    inner, chunk = _mamba_sizes(config)[0], min(_int(config, "chunk_size"), seq_len)
    one = 2 * chunk * state * groups + 2 * chunk * inner + 4 * state * inner + 2 * state * inner / chunk
    return str(config["hybrid_override_pattern"]).count("M") * one


def convolution_flops(config: Config) -> float:
    """The depthwise causal convolutions of all Mamba-2 layers, forward, per token: 2 x kernel x channels."""
    one = 2 * _int(config, "conv_kernel") * _mamba_sizes(config)[1]
    return float(str(config["hybrid_override_pattern"]).count("M") * one)


# ---------------------------------------------------------------- together


def forward_flops(config: Config, seq_len: int) -> float:
    """One forward pass, per token: 2 per weight that a token meets, and what has no weights."""
    return _weight_flops(config) + attention_flops(config, seq_len) + scan_flops(config, seq_len)


def _weight_flops(config: Config) -> float:
    return 2.0 * sum(product.parameters for product in products(config)) + convolution_flops(config)


def training_flops(
    config: Config, case: TrainCase, seq_len: int | None = None, *, fused_head: bool = True
) -> TrainingFlops:
    """One training step of `case`, per token, at `seq_len` (by default the case's).

    Backward of a product: one of the forward's size for the gradient of its input, one for that of its weight. So a
    full fine-tune costs 3 x forward (Megatron-LM, num_floating_point_operations). Under LoRA and QLoRA frozen weights
    have no gradient: 2 x for them, 3 x for adapters (Hu et al. 2021: rank x (inputs + outputs) weights each) and for
    what has no weights, where both factors are activations. Making 4-bit weights whole again is not counted.
    Computed again, in hardware FLOPs alone: with activation checkpointing the forward of every block, adapters
    included; with TRL's fused head (`fused_head`) the head's product (trl 1.16, kernels/chunked_logprob.py, backward).
    """
    length = case.seq_len if seq_len is None else seq_len
    weights, activations = _weight_flops(config), attention_flops(config, length) + scan_flops(config, length)
    adapters = adapter_flops(config, case)
    model = 3 * (weights + activations) if case.method == "full" else 2 * weights + 3 * (activations + adapters)
    head = 2.0 * list(products(config))[-1].parameters
    again = weights - head + activations + adapters if case.activation_checkpointing else 0.0
    return TrainingFlops(
        model_flops_per_token=model, hardware_flops_per_token=model + again + (head if fused_head else 0.0)
    )


def adapter_flops(config: Config, case: TrainCase) -> float:
    """The adapters' two thin products, forward, per token: 2 x rank x (inputs + outputs); none for `full`.

    A target stands for every path that it ends; a routed expert's matrix is a parameter, which only a target with a
    dot reaches (as payload/model.py resolves them).
    """
    if case.method == "full":
        return 0.0
    adapted = [product for product in products(config) if any(_stands_for(name, product) for name in case.lora_targets)]
    return 2.0 * case.lora_rank * sum((product.inputs + product.outputs) * product.times for product in adapted)


def _stands_for(target: str, product: Product) -> bool:
    a_parameter = ".experts." in product.path
    named = product.path == target or product.path.endswith("." + target)
    return named and ("." in target or not a_parameter) and not product.path.endswith(".gate")
