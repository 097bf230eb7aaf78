"""Points that cannot run, one small function each: a case -> the reason, or `None` where it can.

A rule's function name is the word that a skip carries. To add one: a function, and its name in the list of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from harness import catalog
from harness.schema import AnyCase, CaseBase, ChainCase, ProbeCase, ServeCase, TrainCase

Case = AnyCase

REFUSED_TARGETS = ("out_proj", "conv1d")
"""peft refuses them on nemotron_h, where the fused Mamba kernel reads out_proj.weight directly (seen, peft 0.21)."""
INDEX_RANGE = 2**31
"""Elements within reach of mamba_ssm's Triton kernels, which count with 32 bits (read, mamba_ssm 2.3.2:
ssd_chunk_state.py, layernorm_gated.py). What lies further is computed wrongly, often with no error
(https://github.com/state-spaces/mamba/issues/1015)."""


# ---------------------------------------------------------------- training and serving


def no_checkpoint(case: CaseBase) -> str | None:
    """There is nothing to fetch for a shape of our own."""
    if case.weights == "hub" and catalog.variant(case.variant).checkpoint is None:
        return f"{case.variant} has no published weights; use weights: random."
    return None


# ---------------------------------------------------------------- training


def strategy_needs_several_devices(case: TrainCase) -> str | None:
    """DDP and FSDP on one device."""
    least = catalog.strategies()[case.strategy].min_devices
    if case.devices < least:
        return f"{case.strategy} spreads the work over several devices; with {case.devices} there is nothing to spread."
    return None


def several_devices_need_a_strategy(case: TrainCase) -> str | None:
    """No strategy on several devices."""
    most = catalog.strategies()[case.strategy].max_devices
    if most is not None and case.devices > most:
        return f"{case.devices} devices need a strategy that uses them: ddp or fsdp."
    return None


def devices_uneven_over_nodes(case: TrainCase) -> str | None:
    """Ranks that cannot be spread evenly."""
    if case.devices % case.nodes:
        return f"{case.devices} devices cannot be spread evenly over {case.nodes} nodes."
    return None


def seq_len_over_limit(case: TrainCase) -> str | None:
    """Longer than the model's positions."""
    limit = catalog.variant(case.variant).max_length
    if case.seq_len > limit:
        return f"{case.variant} takes at most {limit:,} tokens by its configuration; seq_len is {case.seq_len:,}."
    return None


def tokens_beyond_kernel_index(case: TrainCase) -> str | None:
    """More tokens at once than the GPU kernels of the Mamba layers can count."""
    tokens, width = case.micro_batch * case.seq_len, catalog.variant(case.variant).mamba_width
    if case.device == "cpu" or tokens * width <= INDEX_RANGE:
        return None
    most = INDEX_RANGE // width
    return (
        f"mamba_ssm's kernels count with 32 bits and are silently wrong beyond {most:,} tokens at once of "
        f"{case.variant}; micro_batch x seq_len is {tokens:,}."
    )


def qlora_under_fsdp(case: TrainCase) -> str | None:
    """4-bit weights in a DTensor (seen, transformers 5.23, bitsandbytes 0.50)."""
    if case.strategy == "fsdp" and catalog.methods()[case.method].quantized:
        return (
            "bitsandbytes' 4-bit weights cannot be sharded by FSDP2 ('DTensor' object has no attribute "
            "'compress_statistics'); use ddp, or lora."
        )
    return None


def eight_bit_optimizer_under_fsdp(case: TrainCase) -> str | None:
    """bitsandbytes' optimizer step on sharded parameters (seen, torch 2.13, bitsandbytes 0.50)."""
    if case.strategy == "fsdp" and "8bit" in case.optimizer:
        return (
            "bitsandbytes' 8-bit optimizers cannot step parameters that FSDP2 has sharded "
            '("got mixed torch.Tensor and DTensor"); use adamw_torch_fused.'
        )
    return None


def cpu_offload_without_fsdp(case: TrainCase) -> str | None:
    """Shards that are kept on the host, where nothing is sharded or everything is on the host anyway."""
    if not case.cpu_offload:
        return None
    if case.strategy != "fsdp":
        return f"cpu_offload keeps FSDP2's shards on the host; strategy {case.strategy} has none: use fsdp."
    return "cpu_offload moves what a GPU holds to the host; a CPU case has it there." if case.device == "cpu" else None


def optimizer_needs_gpu(case: TrainCase) -> str | None:
    """Paged state without CUDA."""
    facts = catalog.optimizers()[case.optimizer]
    if case.device == "cpu" and facts.needs_cuda:
        return f"{case.optimizer} needs a GPU: {facts.reason}."
    return None


def flash_attention_needs_gpu(case: TrainCase) -> str | None:
    """FlashAttention without CUDA."""
    if case.device == "cpu" and case.attention == "flash_attention_2":
        return "FlashAttention has kernels for GPUs only; use sdpa on a CPU."
    return None


def memory_cap_needs_gpu(case: TrainCase) -> str | None:
    """A cap on memory that no allocator of a GPU manages."""
    if case.device == "cpu" and case.memory_cap_gib is not None:
        return "memory_cap_gib makes a GPU behave like a smaller one; a CPU case has no GPU to cap."
    return None


def local_checkpoints_between_nodes(case: TrainCase) -> str | None:
    """A checkpoint that ranks of other nodes read back, on one node's disk."""
    if case.checkpoints == "local" and case.nodes > 1 and case.strategy == "fsdp":
        return "checkpoints: local is one node's disk; under fsdp the ranks of all nodes read the checkpoint back."
    return None


def adapter_without_rank(case: TrainCase) -> str | None:
    """An adapter that would train nothing."""
    if catalog.methods()[case.method].adapter and 0 in (case.lora_rank, case.lora_alpha):
        return f"{case.method} needs a lora_rank and a lora_alpha of at least 1; 0 would train nothing."
    return None


def lora_target_refused(case: TrainCase) -> str | None:
    """Modules that peft does not adapt on this architecture."""
    refused = [name for name in case.lora_targets if name.rsplit(".", 1)[-1] in REFUSED_TARGETS]
    if refused:
        return f"peft refuses {' and '.join(refused)} on this model: the fused Mamba kernel reads the weight directly."
    return None


# ---------------------------------------------------------------- serving


def moe_serving_on_cpu(case: ServeCase) -> str | None:
    """vLLM's CPU build has no relu2 experts (seen, vLLM 0.32)."""
    if case.device == "cpu" and catalog.variant(case.variant).layers["moe"]:
        return (
            f"vLLM does not serve the experts of {case.variant} on a CPU (is_act_and_mul=False is supported only for "
            "CUDA, XPU and ROCm); serve it on a GPU, or a dense variant here."
        )
    return None


def mamba_cache_dtype_refused(case: ServeCase) -> str | None:
    """Mamba states in a dtype that the model's documentation forbids."""
    serving = catalog.variant(case.variant).serving
    asked = case.mamba_ssm_cache_dtype
    if serving.mamba_ssm_cache_dtype_required and asked not in (None, serving.mamba_ssm_cache_dtype):
        needed = serving.mamba_ssm_cache_dtype
        return f"{case.variant} needs its Mamba states in {needed}; in {asked} it loses accuracy without a word."
    return None


def max_model_len_over_limit(case: ServeCase) -> str | None:
    """Longer than the model's positions."""
    limit = catalog.variant(case.variant).max_length
    if case.max_model_len > limit:
        return f"{case.variant} takes at most {limit:,} tokens; max_model_len is {case.max_model_len:,}."
    return None


def load_over_max_model_len(case: ServeCase) -> str | None:
    """A request that the server must refuse."""
    if case.input_len + case.output_len > case.max_model_len:
        return (
            f"a request of {case.input_len:,} tokens in and {case.output_len:,} out does not fit into max_model_len "
            f"{case.max_model_len:,}."
        )
    return None


def heads_not_divisible(case: ServeCase) -> str | None:
    """vLLM splits heads evenly (its nemotron_h.py and mamba_mixer2.py assert it)."""
    config, ways = catalog.variant(case.variant).config, case.tensor_parallel
    heads = {name: int(str(config[name])) for name in ("num_attention_heads", "mamba_num_heads")}
    shared = int(str(config["num_key_value_heads"]))
    uneven = [f"{count} {name}" for name, count in heads.items() if count % ways]
    if max(shared, ways) % min(shared, ways):
        uneven.append(f"{shared} num_key_value_heads")
    return f"{' and '.join(uneven)} cannot be split evenly over {ways} GPUs." if uneven else None


# ---------------------------------------------------------------- chains


def full_has_no_adapter(case: ChainCase) -> str | None:
    """Serving the adapter of a method that makes none."""
    if case.serve.adapter == "adapter" and not catalog.methods()[case.train.method].adapter:
        return f"{case.train.method} trains no adapter to serve; use adapter: merged."
    return None


def local_chain_between_nodes(case: ChainCase) -> str | None:
    """A base that ranks of other nodes start from, on one node's disk."""
    if case.train.checkpoints == "local" and case.train.nodes > 1:
        return (
            "checkpoints: local is one node's disk; in a chain the ranks of all nodes start from what is saved there."
        )
    return None


# ---------------------------------------------------------------- probes


def probe_needs_two_ranks(case: ProbeCase) -> str | None:
    """One rank has nobody to talk to."""
    if case.devices < 2:
        return "A probe measures what passes between ranks; give it at least 2 devices."
    return None


def ranks_uneven_over_nodes(case: ProbeCase) -> str | None:
    """Ranks that cannot be spread evenly."""
    if case.devices % case.nodes:
        return f"{case.devices} ranks cannot be spread evenly over {case.nodes} nodes."
    return None


def p2p_needs_gpu(case: ProbeCase) -> str | None:
    """Direct copies between GPUs, without GPUs."""
    if case.device == "cpu" and not case.p2p:
        return "p2p: false keeps GPUs from copying to each other directly; on a CPU there is nothing to turn off."
    return None


TRAIN_RULES: Sequence[Callable[[TrainCase], str | None]] = (
    strategy_needs_several_devices,
    several_devices_need_a_strategy,
    devices_uneven_over_nodes,
    seq_len_over_limit,
    tokens_beyond_kernel_index,
    qlora_under_fsdp,
    eight_bit_optimizer_under_fsdp,
    cpu_offload_without_fsdp,
    optimizer_needs_gpu,
    flash_attention_needs_gpu,
    memory_cap_needs_gpu,
    local_checkpoints_between_nodes,
    adapter_without_rank,
    lora_target_refused,
    no_checkpoint,
)
SERVE_RULES: Sequence[Callable[[ServeCase], str | None]] = (
    moe_serving_on_cpu,
    mamba_cache_dtype_refused,
    max_model_len_over_limit,
    load_over_max_model_len,
    heads_not_divisible,
    no_checkpoint,
)
CHAIN_RULES: Sequence[Callable[[ChainCase], str | None]] = (full_has_no_adapter, local_chain_between_nodes)
PROBE_RULES: Sequence[Callable[[ProbeCase], str | None]] = (
    probe_needs_two_ranks,
    ranks_uneven_over_nodes,
    p2p_needs_gpu,
)


def obstacle(case: Case) -> tuple[str, str] | None:
    """The first rule that `case` breaks and why, or `None` where it can run."""
    return next(_obstacles(case), None)


def _obstacles(case: Case) -> Iterator[tuple[str, str]]:
    if isinstance(case, TrainCase):
        yield from ((rule.__name__, reason) for rule in TRAIN_RULES if (reason := rule(case)))
    elif isinstance(case, ServeCase):
        yield from ((rule.__name__, reason) for rule in SERVE_RULES if (reason := rule(case)))
    elif isinstance(case, ProbeCase):
        yield from ((rule.__name__, reason) for rule in PROBE_RULES if (reason := rule(case)))
    else:
        yield from _obstacles(case.train)
        yield from _obstacles(case.serve)
        yield from ((rule.__name__, reason) for rule in CHAIN_RULES if (reason := rule(case)))
