"""What a matrix means: which cases it gives, which points it skips and why, and what it says of a mistake."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from harness import catalog, matrix
from harness.errors import HarnessError
from harness.matrix import rules
from harness.schema import ChainCase, Plan, ServeCase, TrainCase, case_id

ROOT = Path(__file__).resolve().parent.parent

ON_CPU = "device: cpu, variant: tiny-hybrid, "


def planned(folder: Path, text: str) -> Plan:
    path = folder / "m.yaml"
    path.write_text(f"version: 1\nname: m\n{text}")
    return matrix.load(path)


def mistake(folder: Path, text: str) -> HarnessError:
    with pytest.raises(HarnessError) as caught:
        planned(folder, text)
    return caught.value


def rule_of(plan: Plan) -> str:
    assert not plan.cases
    (skip,) = plan.skips
    assert skip.reason.endswith((".", "…"))
    return skip.rule


# ---------------------------------------------------------------- points


def test_a_block_is_the_product_of_its_lists(tmp_path: Path) -> None:
    plan = planned(tmp_path, f"train: {{{ON_CPU} method: [lora, full], seq_len: [64, 128], micro_batch: 2}}")
    points = [(case.method, case.seq_len, case.micro_batch) for case in plan.cases if isinstance(case, TrainCase)]
    assert points == [("lora", 64, 2), ("lora", 128, 2), ("full", 64, 2), ("full", 128, 2)]
    assert plan.skips == ()


def test_a_block_overrides_defaults_and_takes_those_it_knows(tmp_path: Path) -> None:
    text = """
defaults: {device: cpu, variant: tiny-hybrid, seq_len: 64, max_model_len: 256, method: lora}
train: [{}, {seq_len: 128}]
serve: {load: {concurrency: 2}}
chain: {train: {steps: 9}, serve: {max_model_len: 512}}
"""
    first, second, serve, chain = planned(tmp_path, text).cases
    assert isinstance(first, TrainCase)
    assert isinstance(second, TrainCase)
    assert isinstance(serve, ServeCase)
    assert isinstance(chain, ChainCase)
    assert (first.seq_len, second.seq_len, serve.max_model_len) == (64, 128, 256)
    assert (chain.train.seq_len, chain.train.steps, chain.serve.max_model_len, chain.device) == (64, 9, 512, "cpu")


def test_what_is_not_said_is_resolved(tmp_path: Path) -> None:
    (lora,) = planned(tmp_path, f"train: {{{ON_CPU} method: lora, seq_len: 64}}").cases
    (full,) = planned(tmp_path, f"train: {{{ON_CPU} method: full, seq_len: 64, lora_rank: 32}}").cases
    assert isinstance(lora, TrainCase)
    assert isinstance(full, TrainCase)
    assert lora.lora_targets == catalog.variant("tiny-hybrid").lora_targets
    assert (full.lora_rank, full.lora_alpha, full.lora_targets) == (0, 0, ())


def test_load_points_are_an_axis_of_whole_points(tmp_path: Path) -> None:
    text = f"serve: {{{ON_CPU} load: [{{concurrency: 1}}, {{concurrency: 8, input_len: 64, requests: 32}}]}}"
    cases = [case for case in planned(tmp_path, text).cases if isinstance(case, ServeCase)]
    assert [(case.concurrency, case.input_len, case.requests) for case in cases] == [(1, 128, 16), (8, 64, 32)]


def test_a_chain_shares_what_both_halves_have(tmp_path: Path) -> None:
    text = f"""
chain: {{{ON_CPU} param_dtype: fp32, thinking: false, time_limit: 2m, train: {{method: lora, seq_len: 64}},
         serve: {{adapter: [adapter, merged]}}}}
"""
    chains = [case for case in planned(tmp_path, text).cases if isinstance(case, ChainCase)]
    assert [chain.serve.adapter for chain in chains] == ["adapter", "merged"]
    for half in (chains[0].train, chains[0].serve):
        assert (half.variant, half.param_dtype, half.thinking, half.time_limit_s) == ("tiny-hybrid", "fp32", False, 120)


def test_a_chain_serves_its_adapter_unless_told_otherwise(tmp_path: Path) -> None:
    (chain,) = planned(tmp_path, f"chain: {{{ON_CPU} train: {{method: lora, seq_len: 64}}}}").cases
    assert isinstance(chain, ChainCase)
    assert chain.serve.adapter == "adapter"


def test_repeat_is_a_count(tmp_path: Path) -> None:
    cases = planned(tmp_path, f"train: {{{ON_CPU} method: lora, seq_len: 64, repeat: 3}}").cases
    assert [getattr(case, "repeat", None) for case in cases] == [0, 1, 2]
    assert len({case_id(case) for case in cases}) == 3


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5", 1.5), ("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_times_have_units(tmp_path: Path, text: str, seconds: float) -> None:
    (case,) = planned(
        tmp_path, f"train: {{{ON_CPU} method: lora, seq_len: 64, time_limit: {text}, stall: {text}}}"
    ).cases
    assert isinstance(case, TrainCase)
    assert (case.time_limit_s, case.stall_s) == (seconds, seconds)


def test_a_list_of_names_is_one_value_of_lora_targets(tmp_path: Path) -> None:
    one = planned(tmp_path, f"train: {{{ON_CPU} method: lora, seq_len: 64, lora_targets: [in_proj, q_proj]}}").cases
    two = planned(tmp_path, f"train: {{{ON_CPU} method: lora, seq_len: 64, lora_targets: [[in_proj], [q_proj]]}}").cases
    assert [getattr(case, "lora_targets", None) for case in one] == [("in_proj", "q_proj")]
    assert [getattr(case, "lora_targets", None) for case in two] == [("in_proj",), ("q_proj",)]


def test_yaml_1_2_numbers(tmp_path: Path) -> None:
    (case,) = planned(tmp_path, f"train: {{{ON_CPU} method: lora, seq_len: 64, learning_rate: 2e-3}}").cases
    assert isinstance(case, TrainCase)
    assert case.learning_rate == 0.002


def test_merge_keys_and_anchors(tmp_path: Path) -> None:
    text = f"train: [&a {{{ON_CPU} method: lora, seq_len: 64}}, {{<<: *a, seq_len: 128}}]"
    assert [getattr(case, "seq_len", None) for case in planned(tmp_path, text).cases] == [64, 128]


# ---------------------------------------------------------------- include, exclude, duplicates


def test_exclude_makes_skips(tmp_path: Path) -> None:
    text = f"""
train: {{{ON_CPU} method: [lora, full], seq_len: [64, 128, 256],
  exclude: [{{method: full, seq_len: [128, 256]}}, {{seq_len: 64}}]}}
"""
    plan = planned(tmp_path, text)
    assert [(c.method, c.seq_len) for c in plan.cases if isinstance(c, TrainCase)] == [("lora", 128), ("lora", 256)]
    assert [skip.rule for skip in plan.skips] == ["excluded"] * 4
    assert "line 5" in plan.skips[0].reason


def test_exclude_sees_defaults_and_load(tmp_path: Path) -> None:
    text = f"""
serve: {{{ON_CPU} load: [{{concurrency: 1}}, {{concurrency: 8}}], exclude: [{{max_num_seqs: 64, concurrency: 8}}]}}
"""
    plan = planned(tmp_path, text)
    assert [getattr(case, "concurrency", None) for case in plan.cases] == [1]
    assert [skip.rule for skip in plan.skips] == ["excluded"]


def test_include_adds_points_with_the_blocks_single_values(tmp_path: Path) -> None:
    text = f"train: {{{ON_CPU} method: [lora, full], seq_len: 64, include: [{{method: lora, seq_len: 128, seed: 7}}]}}"
    last = planned(tmp_path, text).cases[-1]
    assert isinstance(last, TrainCase)
    assert (last.variant, last.device, last.seq_len, last.seed) == ("tiny-hybrid", "cpu", 128, 7)


def test_include_alone_is_a_list_of_points(tmp_path: Path) -> None:
    text = f"defaults: {{{ON_CPU} method: lora}}\ntrain: {{include: [{{seq_len: 64}}, {{seq_len: 128}}]}}"
    assert [getattr(case, "seq_len", None) for case in planned(tmp_path, text).cases] == [64, 128]


def test_equal_points_are_one_case_and_a_skip(tmp_path: Path) -> None:
    plan = planned(tmp_path, f"train: {{{ON_CPU} method: full, seq_len: 64, lora_rank: [8, 16, 32]}}")
    (case,) = plan.cases
    assert [skip.rule for skip in plan.skips] == ["duplicate", "duplicate"]
    assert case_id(case) in plan.skips[0].reason
    assert "full ignores lora_rank" in plan.skips[0].reason


def test_an_excluded_point_that_another_block_plans_is_a_duplicate(tmp_path: Path) -> None:
    block = f"{ON_CPU} method: lora, seq_len: 64"
    plan = planned(tmp_path, f"train: [{{{block}, seed: [1, 42], exclude: [{{seed: 42}}]}}, {{{block}}}]")
    assert len(plan.cases) == 2
    assert [skip.rule for skip in plan.skips] == ["duplicate"]


axes = st.fixed_dictionaries(
    {
        "variant": st.lists(st.sampled_from(sorted(catalog.variants())), min_size=1, max_size=3, unique=True),
        "method": st.lists(st.sampled_from(["lora", "qlora", "full"]), min_size=1, unique=True),
        "seq_len": st.lists(st.sampled_from([64, 4096, 8192, 300_000]), min_size=1, max_size=3, unique=True),
        "strategy": st.lists(st.sampled_from(["none", "ddp", "fsdp"]), min_size=1, unique=True),
        "devices": st.lists(st.sampled_from([1, 2, 8]), min_size=1, unique=True),
        "lora_rank": st.lists(st.sampled_from([0, 8, 16]), min_size=1, unique=True),
        "device": st.lists(st.sampled_from(["cpu", "cuda"]), min_size=1, unique=True),
    },
    optional={
        "repeat": st.integers(1, 3),
        "attention": st.lists(st.sampled_from(["sdpa", "flash_attention_2"]), min_size=1, unique=True),
        "include": st.lists(
            st.fixed_dictionaries({
                "variant": st.just("tiny-moe"), "method": st.just("lora"), "seq_len": st.sampled_from([64, 128]),
                "strategy": st.just("none"), "devices": st.just(1), "lora_rank": st.just(8), "device": st.just("cpu"),
                "attention": st.just("sdpa"),
            }),
            max_size=3,
        ),
    },
)  # fmt: skip


@given(block=axes)
def test_cases_and_skips_are_the_product_and_the_includes(
    block: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("m") / "m.yaml"
    with path.open("w") as stream:
        YAML().dump({"version": 1, "name": "m", "train": [block]}, stream)
    plan = matrix.load(path)
    repeat = block.get("repeat", 1)
    assert isinstance(repeat, int)
    lists = [value for name, value in block.items() if name not in ("include", "repeat")]
    product = math.prod(len(value) for value in lists if isinstance(value, list))
    include = block.get("include", [])
    assert isinstance(include, list)
    assert len(plan.cases) + len(plan.skips) == (product + len(include)) * repeat
    assert max(Counter(case_id(case) for case in plan.cases).values(), default=1) == 1
    cases = {case_id(case) for case in plan.cases}
    assert all((case_id(skip.case) in cases) <= (skip.rule == "duplicate") for skip in plan.skips)
    assert all(rules.obstacle(case) is None for case in plan.cases)
    assert matrix.load(path) == plan


# ---------------------------------------------------------------- rules

TRAIN = "variant: nano-9b-v2, method: lora, seq_len: 64"
WIDE = "devices: 4, nodes: 2, checkpoints: local"
CHAINED = "chain: {variant: nano-9b-v2, train: {method: lora, seq_len: 64, strategy: ddp, devices: 4, "
BROKEN = {
    "strategy_needs_several_devices": f"train: {{{TRAIN}, strategy: fsdp}}",
    "several_devices_need_a_strategy": f"train: {{{TRAIN}, devices: 2}}",
    "devices_uneven_over_nodes": f"train: {{{TRAIN}, strategy: ddp, devices: 8, nodes: 3}}",
    "seq_len_over_limit": "train: {variant: nano-9b-v2, method: lora, seq_len: 131073}",
    "tokens_beyond_kernel_index": "train: {variant: nano-9b-v2, method: lora, seq_len: 31596, micro_batch: 3}",
    "qlora_under_fsdp": "train: {variant: nano-9b-v2, method: qlora, seq_len: 64, strategy: fsdp, devices: 2}",
    "eight_bit_optimizer_under_fsdp": f"train: {{{TRAIN}, strategy: fsdp, devices: 2, optimizer: adamw_8bit}}",
    "cpu_offload_without_fsdp": f"train: {{{TRAIN}, strategy: ddp, devices: 2, cpu_offload: true}}",
    "optimizer_needs_gpu": f"train: {{{TRAIN}, device: cpu, optimizer: paged_adamw_8bit}}",
    "flash_attention_needs_gpu": f"train: {{{TRAIN}, device: cpu, attention: flash_attention_2}}",
    "memory_cap_needs_gpu": f"train: {{{TRAIN}, device: cpu, memory_cap_gib: 24}}",
    "local_checkpoints_between_nodes": f"train: {{{TRAIN}, {WIDE}, strategy: fsdp}}",
    "adapter_without_rank": f"train: {{{TRAIN}, lora_rank: 0}}",
    "lora_target_refused": f"train: {{{TRAIN}, lora_targets: [in_proj, out_proj]}}",
    "no_checkpoint": "train: {variant: tiny-hybrid, method: lora, seq_len: 64, weights: hub}",
    "moe_serving_on_cpu": "serve: {variant: tiny-moe, device: cpu}",
    "mamba_cache_dtype_refused": "serve: {variant: nano-9b-v2, mamba_ssm_cache_dtype: bfloat16}",
    "max_model_len_over_limit": "serve: {variant: nano-9b-v2, max_model_len: 131073}",
    "load_over_max_model_len": "serve: {variant: nano-9b-v2, max_model_len: 16, load: {input_len: 8, output_len: 9}}",
    "heads_not_divisible": "serve: {variant: nano-9b-v2, tensor_parallel: 3}",
    "full_has_no_adapter": "chain: {variant: nano-9b-v2, train: {method: full, seq_len: 64}}",
    "local_chain_between_nodes": CHAINED + "nodes: 2, checkpoints: local}}",
}
SOUND = {
    "strategy_needs_several_devices": f"train: {{{TRAIN}, strategy: fsdp, devices: 2}}",
    "several_devices_need_a_strategy": f"train: {{{TRAIN}, strategy: ddp, devices: 8}}",
    "devices_uneven_over_nodes": f"train: {{{TRAIN}, strategy: ddp, devices: 8, nodes: 2}}",
    "seq_len_over_limit": "train: {variant: nano-9b-v2, device: cpu, method: lora, seq_len: 131072}",
    "tokens_beyond_kernel_index": "train: {variant: nano-9b-v2, method: lora, seq_len: 31595, micro_batch: 3}",
    "qlora_under_fsdp": "train: {variant: nano-9b-v2, method: qlora, seq_len: 64, strategy: ddp, devices: 2}",
    "eight_bit_optimizer_under_fsdp": f"train: {{{TRAIN}, strategy: ddp, devices: 2, optimizer: adamw_8bit}}",
    "cpu_offload_without_fsdp": f"train: {{{TRAIN}, strategy: fsdp, devices: 2, cpu_offload: true}}",
    "optimizer_needs_gpu": f"train: {{{TRAIN}, optimizer: paged_adamw_8bit}}",
    "flash_attention_needs_gpu": f"train: {{{TRAIN}, attention: flash_attention_2}}",
    "memory_cap_needs_gpu": f"train: {{{TRAIN}, memory_cap_gib: 24}}",
    "local_checkpoints_between_nodes": f"train: {{{TRAIN}, {WIDE}, strategy: ddp}}",
    "adapter_without_rank": f"train: {{{TRAIN}, lora_rank: 1, lora_alpha: 1}}",
    "lora_target_refused": f"train: {{{TRAIN}, lora_targets: [in_proj]}}",
    "no_checkpoint": "train: {variant: nano-9b-v2, method: lora, seq_len: 64, weights: hub}",
    "moe_serving_on_cpu": "serve: {variant: tiny-moe, device: cuda}",
    "mamba_cache_dtype_refused": "serve: {variant: nano-9b-v2, mamba_ssm_cache_dtype: float32}",
    "max_model_len_over_limit": "serve: {variant: nano-9b-v2, max_model_len: 131072}",
    "load_over_max_model_len": "serve: {variant: nano-9b-v2, max_model_len: 16, load: {input_len: 8, output_len: 8}}",
    "heads_not_divisible": "serve: {variant: nano-30b-a3b, tensor_parallel: 4}",
    "full_has_no_adapter": "chain: {variant: nano-9b-v2, train: {method: full, seq_len: 64}, serve: {adapter: merged}}",
    "local_chain_between_nodes": CHAINED + "checkpoints: local}}",
}


@pytest.mark.parametrize("rule", BROKEN)
def test_an_impossible_point_is_a_skip(tmp_path: Path, rule: str) -> None:
    assert rule_of(planned(tmp_path, BROKEN[rule])) == rule


@pytest.mark.parametrize("rule", SOUND)
def test_the_nearest_possible_point_is_a_case(tmp_path: Path, rule: str) -> None:
    plan = planned(tmp_path, SOUND[rule])
    assert (len(plan.cases), plan.skips) == (1, ())


def test_every_rule_is_tried_above() -> None:
    every = {*rules.TRAIN_RULES, *rules.SERVE_RULES, *rules.CHAIN_RULES}
    assert {rule.__name__ for rule in every} == set(BROKEN) == set(SOUND)


def test_a_cap_is_an_axis_in_which_null_is_the_whole_card(tmp_path: Path) -> None:
    plan = planned(tmp_path, f"train: {{{TRAIN}, memory_cap_gib: [24, 22.5, null]}}")
    assert [case.memory_cap_gib for case in plan.cases if isinstance(case, TrainCase)] == [24.0, 22.5, None]


def test_a_chain_whose_half_cannot_run_is_a_skip(tmp_path: Path) -> None:
    plan = planned(tmp_path, "chain: {variant: tiny-moe, device: cpu, train: {method: lora, seq_len: 64}}")
    assert rule_of(plan) == "moe_serving_on_cpu"


# ---------------------------------------------------------------- mistakes

LORA = f"{ON_CPU} method: lora, seq_len: 64"
MISTAKES = [
    ("train:\n  - varient: tiny-hybrid", ":4: unknown key 'varient' in a train block (did you mean variant?)"),
    ("varient: 1", ":3: unknown key 'varient' in a matrix"),
    ("defaults: {seqlen: 5}\ntrain: {}", ":3: unknown key 'seqlen' in defaults (did you mean seq_len?)"),
    ("train:\n  variant: tiny-hybird", ":4: variant: no variant is called 'tiny-hybird' (did you mean tiny-hybrid?)"),
    ("train:\n  method: loar", ":4: method: 'loar' is not one of lora, qlora, full (did you mean lora?)"),
    ("train:\n  seq_len: 64\n  seq_len: 128", ":5: the key 'seq_len' stands twice"),
    (f"train: {{{LORA}, micro_batch: '2'}}", ":3: micro_batch: must be a whole number, not '2'"),
    (f"train: {{{LORA}, micro_batch: true}}", ":3: micro_batch: must be a whole number, not true"),
    (f"train: {{{LORA}, micro_batch: 1.0}}", ":3: micro_batch: must be a whole number, not 1.0"),
    (f"train: {{{LORA}, micro_batch: [1, 0]}}", ":3: micro_batch: must be at least 1, not 0"),
    (f"train: {{{LORA}, micro_batch: [1, 1]}}", ":3: micro_batch: 1 stands twice"),
    (f"train: {{{LORA}, micro_batch: []}}", ":3: micro_batch: an empty list has no value to try"),
    (f"train: {{{LORA}, micro_batch: }}", ":3: micro_batch: must be a whole number, not nothing"),
    (f"train: {{{LORA}, thinking: no}}", ":3: thinking: must be true or false, not 'no'"),
    (f"train: {{{LORA}, learning_rate: .nan}}", ":3: learning_rate: must be a finite number, not nan"),
    (f"train: {{{LORA}, learning_rate: .inf}}", ":3: learning_rate: must be a finite number, not inf"),
    (f"train: {{{LORA}, time_limit: soon}}", ":3: time_limit: must be seconds or a time such as 10m or 2h, not 'soon'"),
    (f"train: {{{LORA}, time_limit: true}}", ":3: time_limit: must be seconds or a time such as 10m or 2h, not true"),
    (f"train: {{{LORA}, stall: 0s}}", ":3: stall: must be more than 0 seconds, not '0s'"),
    (f"train: {{{LORA}, steps: 5}}", ":3: 5 warmup_steps leave nothing of 5 steps to measure"),
    (f"train: {{{LORA}, steps: [40, 8], warmup_steps: [2, 8]}}", ":3: 8 warmup_steps leave nothing of 8 steps"),
    (f"train: {{{LORA}, ladder: up}}", ":3: ladder: 'up' is not one of off, oom, nccl, both"),
    (f"train: {{{LORA}, ladder: [oom]}}", ":3: ladder: one value for the whole block, not a list"),
    (f"train: {{{LORA}, frontier: seq_len}}", ":3: frontier: seq_len has too few values to search"),
    (f"train: {{{LORA}, frontier: variant}}", ":3: frontier: 'variant' is not one of seq_len, micro_batch"),
    (f"train: {{{LORA}, data: mine.jsonl}}", "is neither synthetic nor a JSONL file: there is no "),
    (f"train: {{{LORA}, weights: radnom}}", "(did you mean random?)"),
    (f"train: {{{LORA}, lora_targets: in_proj}}", ":3: lora_targets: must be a list of module names, not 'in_proj'"),
    (f"train: {{{LORA}, memory_cap_gib: 0}}", ":3: memory_cap_gib: must be at least 1, not 0"),
    (f"train: {{{LORA}, memory_cap_gib: 24GiB}}", ":3: memory_cap_gib: must be a number, not '24GiB'"),
    (f"chain: {{{ON_CPU} train: {{method: lora, seq_len: 64, memory_cap_gib: 24}}}}", "unknown key 'memory_cap_gib'"),
    (f"train: {{{LORA}, repeat: [1, 2]}}", ":3: repeat: must be a whole number, not a list"),
    (f"train: {{{LORA}, repeat: 100001}}", "this block has 100,001 points"),
    (f"train: {{{LORA}, exclude: [{{seq_len: 999}}]}}", ":3: this exclude takes out no point of its block"),
    (f"train: {{{LORA}, exclude: [{{}}]}}", ":3: an empty point would exclude everything"),
    (f"train: {{{LORA}, exclude: {{seq_len: 64}}}}", ":3: exclude must be a list of points, not a mapping"),
    (f"train: {{{LORA}, include: [{{seed: [1, 2]}}]}}", ":3: seed: a point of include has one value"),
    (f"train: {{{ON_CPU} method: lora, seq_len: [8, 9], include: [{{seed: 1}}]}}", "must say which 'seq_len'"),
    (f"train: {{{ON_CPU} method: lora}}", ":3: a train block needs 'seq_len'"),
    ("train: 5", ":3: a train block must be a mapping of keys to values, not 5"),
    ("train: []", ":1: a matrix needs at least one block under train, serve, chain or probe"),
    ("defaults: {}", ":1: a matrix needs at least one block under train, serve, chain or probe"),
    (f"serve: {{{ON_CPU} load: [{{concurency: 1}}]}}", "unknown key 'concurency' in load (did you mean concurrency?)"),
    (f"serve: {{{ON_CPU} load: 5}}", ":3: load must be a mapping of keys to values, not 5"),
    (f"serve: {{{ON_CPU} adapter: merged}}", ":3: adapter: merged is what a chain has trained"),
    (f"serve: {{{ON_CPU} gpu_memory_utilization: 1.5}}", ":3: gpu_memory_utilization: must be at most 1, not 1.5"),
    (f"chain: {{{ON_CPU} method: lora}}", ":3: 'method' stands under `train:` in a chain block"),
    (f"chain: {{{ON_CPU} train: {{seqlen: 5}}}}", "'seqlen' in `train:` of a chain block (did you mean seq_len?)"),
    (f"chain: {{{ON_CPU} serve: {{adapter: none}}}}", "a chain serves what it trained: adapter or merged, not 'none'"),
    ("train: {5: 6}", ":3: the key 5 must be a word"),
    ("train: [", "no valid YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), MISTAKES)
def test_a_mistake_is_one_message_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    error = mistake(tmp_path, text)
    assert error.message.startswith(f"{tmp_path / 'm.yaml'}:")
    assert expected in error.message
    assert "\n" not in error.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "m.yaml:1: a matrix must be a mapping of keys to values, not nothing"),
        ("name: m", "m.yaml:1: the key 'version' is missing"),
        ("version: 1\ntrain: {include: []}", "m.yaml:1: the key 'name' is missing"),
        ("version: one", "m.yaml:1: version must be 1, not 'one'"),
        ("version: true", "m.yaml:1: version must be 1, not true"),
        ("later: x\nversion: 2", "m.yaml:2: version 2 is newer than this harness"),
        ("version: 1\nname: ../x\nserve: {variant: tiny-hybrid}", "m.yaml:2: name must be"),
    ],
)
def test_the_head_of_a_matrix(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(HarnessError) as caught:
        matrix.load(tmp_path / "m.yaml")
    assert expected in caught.value.message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="cannot be read: No such file"):
        matrix.load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HarnessError, match="no UTF-8 text"):
        matrix.load(tmp_path / "binary.yaml")


@given(text=st.text(alphabet=st.sampled_from("abc:-[]{}&*<>!|'\"#? \n\t012"), max_size=60))
def test_any_text_gives_a_plan_or_one_message(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(f"version: 1\nname: m\ntrain:\n  variant: {text}", encoding="utf-8")
    with pytest.raises(HarnessError):
        matrix.load(path)


# ---------------------------------------------------------------- paths


def test_paths_are_taken_from_the_matrix_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.chdir("/")
    (case,) = planned(tmp_path, f"train: {{{LORA}, data: mine.jsonl, weights: model}}").cases
    assert isinstance(case, TrainCase)
    assert (case.data, case.weights) == (str(tmp_path / "mine.jsonl"), str(tmp_path / "model"))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert "model has no config.json" in mistake(tmp_path, f"train: {{{LORA}, weights: model}}").message


def test_a_saved_adapter_can_be_served(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    (case,) = planned(tmp_path, f"serve: {{{ON_CPU} adapter: [none, mine]}}").cases[1:]
    assert isinstance(case, ServeCase)
    assert case.adapter == str(tmp_path / "mine")


# ---------------------------------------------------------------- the matrices that come with the product


@pytest.mark.parametrize("path", sorted((ROOT / "matrices").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_matrix_loads_under_its_own_name(path: Path) -> None:
    plan = matrix.load(path)
    assert plan.name == path.stem
    assert plan.cases


def test_the_quickstart_shows_every_kind_on_a_cpu() -> None:
    plan = matrix.load(ROOT / "matrices" / "quickstart.yaml")
    trained = [case for case in plan.cases if isinstance(case, TrainCase)]
    assert {case.method for case in trained} == {"lora", "qlora", "full"}
    assert {(case.strategy, case.devices) for case in trained} == {("none", 1), ("ddp", 2), ("fsdp", 2)}
    assert {case.variant for case in trained} == {"tiny-hybrid", "tiny-moe"}
    assert sum(isinstance(case, ServeCase) for case in plan.cases) == 3
    assert any(isinstance(case, ChainCase) for case in plan.cases)
    assert {skip.rule for skip in plan.skips} == {"strategy_needs_several_devices", "moe_serving_on_cpu"}
    assert {case.device for case in plan.cases} == {"cpu"}


# ---------------------------------------------------------------- ladders and searches


def test_a_ladder_is_asked_for_in_the_plan_and_names_no_case_anew(tmp_path: Path) -> None:
    plain = planned(tmp_path, f"train: {{{LORA}}}")
    asked = planned(tmp_path, f"train: {{{LORA}, ladder: both, ladder_tries: 3, ladder_minutes: 90}}")
    assert plain.cases == asked.cases
    assert plain.ladders == {}
    (found,) = asked.ladders.values()
    assert (found.ladders, found.order, found.tries, found.minutes) == (("oom", "nccl"), "seed000", 3, 90)


def test_ladder_off_is_none(tmp_path: Path) -> None:
    assert planned(tmp_path, f"train: {{{LORA}, ladder: off}}").ladders == {}


def test_a_range_is_a_grid_and_a_frontier_searches_it(tmp_path: Path) -> None:
    text = f"train: {{{ON_CPU} method: [lora, full], seq_len: {{from: 64, to: 300, step: 64}}, frontier: seq_len}}"
    plan = planned(tmp_path, text)
    lengths = {case_id(case): case.seq_len for case in plan.cases if isinstance(case, TrainCase)}
    assert len(plan.frontiers) == 2
    for search in plan.frontiers:
        assert [lengths[name] for name in search.case_ids] == [64, 128, 192, 256]
    assert sorted(name for search in plan.frontiers for name in search.case_ids) == sorted(lengths)


def test_a_servers_limits_are_searched_one_load_at_a_time(tmp_path: Path) -> None:
    text = """serve: {variant: nano-9b-v2, max_num_seqs: [64, 256, 1024], frontier: max_num_seqs,
      load: [{concurrency: 1, input_len: 8, output_len: 8, requests: 1},
             {concurrency: 4, input_len: 8, output_len: 8, requests: 4}]}"""
    assert [len(search.case_ids) for search in planned(tmp_path, text).frontiers] == [3, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seq_len: {from: 64, to: 32, step: 1}", "from 64 to 32 by 1 is no range"),
        ("seq_len: {from: 64, to: 128}", "a range needs `step`"),
        ("seq_len: {from: 64, until: 128, step: 8}", "unknown key 'until'"),
        ("seq_len: [64, 128, 256], frontier: seq_len, ladder: oom", "a case that does not fit is an answer here"),
        ("seq_len: 64, include: [{seq_len: 8, frontier: seq_len}]", "a point of include is one case"),
    ],
)
def test_a_search_that_cannot_be_is_a_mistake(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(HarnessError) as caught:
        planned(tmp_path, f"train: {{{ON_CPU} method: lora, {text}}}")
    assert message in caught.value.message
