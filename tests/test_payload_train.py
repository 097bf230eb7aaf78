"""The training payload as it runs: real cases of the tiny variants, one process each, in the training environment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness import catalog, events, launch
from harness.schema import TrainCase, case_id

pytestmark = pytest.mark.payload

ROOT = Path(__file__).resolve().parent.parent
STEPS = 4


def train_case(**fields: Any) -> TrainCase:
    variant = fields.setdefault("variant", "tiny-hybrid")
    method = fields.setdefault("method", "lora")
    if method == "full":
        fields |= {"lora_rank": 0}
    else:
        fields.setdefault("lora_targets", catalog.variant(variant).lora_targets)
    asked = {"device": "cpu", "param_dtype": "fp32", "seq_len": 64, "steps": STEPS, "warmup_steps": 1,
             "learning_rate": 5e-3, "time_limit_s": 120, **fields}  # fmt: skip
    return TrainCase(**asked)


@dataclass
class Ran:
    """What is left of one job."""

    job_dir: Path
    exit_code: int
    output: str

    def of(self, kind: str, rank: int = 0) -> list[dict[str, Any]]:
        found = [event for _, event in events.read(events.file_of(str(self.job_dir), rank))]
        assert None not in found
        return [event for event in found if event and event["kind"] == kind]

    def one(self, kind: str, rank: int = 0) -> dict[str, Any]:
        (found,) = self.of(kind, rank)
        return found


class Runner:
    """Runs cases in the training environment, as the launch module says."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python, self.folder = python, folder

    def start(self, name: str, case: TrainCase, keep: str = "none", wrong: dict[str, Any] | None = None) -> Ran:
        job = launch.jobs((case,), 1)[0]
        job_dir = self.folder / name
        job_dir.mkdir()
        payload = {**job.payload, "keep": keep}
        payload["case"] = {**payload["case"], **(wrong or {})}
        (job_dir / "job.json").write_text(json.dumps(payload))
        return self.call(job_dir, job.argv[1:], job.env)

    def call(self, job_dir: Path, argv: tuple[str, ...], env: dict[str, str]) -> Ran:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        done = subprocess.run(
            [self.python, *argv], cwd=job_dir, env={**kept, **env, "PYTHONPATH": str(ROOT)}, text=True, timeout=200,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        logs = "".join(path.read_text() for path in sorted(job_dir.glob("logs/**/*.log")))
        return Ran(job_dir, done.returncode, done.stdout + logs)

    def good(self, name: str, case: TrainCase, keep: str = "none") -> Ran:
        ran = self.start(name, case, keep)
        assert ran.exit_code == 0, ran.output[-4000:]
        return ran


@pytest.fixture(scope="module")
def runner(environments: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(environments / "train/bin/python", tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def lora(runner: Runner) -> Ran:
    """A LoRA case in bf16 that keeps its adapter, as a chain's first half."""
    return runner.good("lora", train_case(param_dtype="bf16", grad_accum=2), keep="adapter")


@pytest.fixture(scope="module")
def ddp(runner: Runner) -> Ran:
    """All parameters train, the head's included: its gradient is what a wrong sharding plan leaves unreduced."""
    return runner.good("ddp", train_case(method="full", devices=2, strategy="ddp", grad_accum=2))


# ---------------------------------------------------------------- one rank


def test_events_come_in_order_and_whole(lora: Ran) -> None:
    assert [event["name"] for event in lora.of("phase") if event["state"] == "begin"] == [
        "data", "load", "prepare", "train", "save", "eval", "reload"]  # fmt: skip
    first = next(event for _, event in events.read(events.file_of(str(lora.job_dir), 0)) if event)
    assert first["kind"] == "alive"
    start = lora.one("start")
    assert (start["rank"], start["world_size"], start["device"]["type"]) == (0, 1, "cpu")
    assert {"torch", "transformers", "trl", "peft"} <= set(start["libraries"])
    assert lora.one("end")["ok"] is True
    assert lora.one("eval")["loss"] > 0


def test_every_step_is_measured(lora: Ran) -> None:
    steps = lora.of("step")
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert [step["warmup"] for step in steps] == [True, False, False, False]
    for step in steps:
        assert step["tokens"] == step["padded_tokens"] == 2 * 64
        assert 0 < step["data_wait_s"] < step["before_collective_s"] < step["step_time_s"]
        assert step["grad_norm"] > 0
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_memory_has_a_peak_of_every_phase_on_top_of_the_libraries(lora: Ran) -> None:
    peaks = {event["phase"]: event for event in lora.of("memory")}
    assert set(peaks) == {"load", "first_forward", "backward", "optimizer_step", "save", "eval"}
    baseline = lora.one("start")["baseline_rss_bytes"]
    assert all(peak["peak_rss_bytes"] > baseline > 100e6 for peak in peaks.values())
    assert all(peak["peak_allocated_bytes"] is None for peak in peaks.values())


def test_proof_of_lora(lora: Ran) -> None:
    proof = lora.one("proof")
    assert proof["mismatches"] == []
    assert set(proof["trainable_by_layer_type"]) == {"mamba", "mlp", "attention"}
    assert proof["trainable_parameters"] == sum(proof["trainable_by_layer_type"].values())
    assert proof["total_parameters"] - proof["trainable_parameters"] == catalog.variant("tiny-hybrid").parameters
    assert set(proof["kernels"].values()) == {"torch"}
    assert proof["loss_path"] == "trl_fused_head"
    assert proof["adapter"]["targets"] == sorted(catalog.variant("tiny-hybrid").lora_targets)
    assert proof["activation_checkpointing"] == {"blocks": 5, "on": 5}
    assert proof["sharding"]["wrapper"] is None
    assert not any(key.startswith("float32") for key in proof["bytes_by_dtype_and_class"] if "LoRA" not in key)


def test_samples_show_the_policy(lora: Ran) -> None:
    content = json.loads((lora.job_dir / "samples.json").read_text())
    assert (content["thinking"], content["switch"], len(content["samples"])) == (True, "message", 5)
    assert content["samples"][0]["text"].startswith("<SPECIAL_10>System\n\n<SPECIAL_11>User\nContinue:")
    assert content["samples"][4]["text"] in (lora.job_dir / "samples.txt").read_text()


def test_the_checkpoint_reads_back_and_the_adapter_is_kept(lora: Ran) -> None:
    reload, save = lora.one("reload"), lora.one("save")
    assert reload["ok"] is True
    assert reload["checks"] == {"files": True, "shapes": True, "tokenizer": True, "logits": True}
    assert reload["max_abs_logit_difference"] == 0.0
    assert (save["writer_rank"], save["bytes"] > 100_000) == (0, True)
    artifacts = lora.job_dir / "artifacts"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names(artifacts / "adapter")
    base = {"config.json", "model.safetensors.index.json", "tokenizer.json", "chat_template.jinja"}
    assert base <= names(artifacts / "base")
    assert not (artifacts / "merged").exists()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_merged_model_loads_and_differs_from_its_base(runner: Runner) -> None:
    ran = runner.good("merged", train_case(method="qlora"), keep="merged")
    proof = ran.one("proof")
    assert proof["quantization"]["types"] == ["nf4"]
    assert proof["quantization"]["plain_linear"] == ["lm_head", "out_proj"]
    assert ran.one("reload")["max_abs_logit_difference"] == 0.0
    merge = ran.one("merge")
    assert merge["duration_s"] > 0
    assert merge["peak_rss_bytes"] > ran.one("start")["baseline_rss_bytes"]
    said = python(runner, ran.job_dir, """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.arange(20, 60)[None]
models = [AutoModelForCausalLM.from_pretrained("artifacts/" + name).eval() for name in ("base", "merged")]
logits = [model(ids).logits for model in models]
tokenizer = AutoTokenizer.from_pretrained("artifacts/merged")
print(json.dumps({"difference": (logits[0] - logits[1]).abs().max().item(), "vocabulary": len(tokenizer),
                  "modules": {type(m).__name__ for m in models[1].modules()} & {"Linear4bit", "LoraLayer"} == set()}))
""")  # fmt: skip
    assert said["difference"] > 1e-3
    assert said["modules"] is True
    assert said["vocabulary"] == 2048


def python(runner: Runner, folder: Path, code: str, *arguments: str) -> Any:
    """The JSON that a script prints last, run by the training environment's Python in `folder`."""
    env = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    ran = runner.call(folder, ("-W", "ignore", "-c", code, *arguments), env)
    assert ran.exit_code == 0, ran.output
    lines = [line for line in ran.output.splitlines() if line.startswith('{"')]
    return json.loads(lines[-1])


def test_a_full_fine_tune_trains_everything_and_learns(runner: Runner) -> None:
    ran = runner.good("full", train_case(method="full", activation_checkpointing=False, steps=20, thinking=False))
    proof, steps = ran.one("proof"), ran.of("step")
    assert proof["adapter"] is None
    assert proof["trainable_parameters"] == proof["total_parameters"] == catalog.variant("tiny-hybrid").parameters
    assert proof["activation_checkpointing"]["on"] == 0
    assert steps[-1]["loss"] < steps[0]["loss"] / 2
    assert ran.one("reload")["ok"] is True
    assert "<think></think>" in (ran.job_dir / "samples.txt").read_text()


def test_experts_train_under_lora_and_are_quantized_under_qlora(runner: Runner) -> None:
    moe = {"variant": "tiny-moe", "steps": 2}
    ran = runner.good("moe", train_case(**moe, lora_targets=("in_proj", "experts.up_proj", "experts.down_proj")))
    proof = ran.one("proof")
    assert proof["adapter"]["targets"] == ["experts.down_proj", "experts.up_proj", "in_proj"]
    assert proof["trainable_by_layer_type"]["moe"] > 0
    assert ran.one("reload")["max_abs_logit_difference"] == 0.0
    assert 1 <= ran.one("eval")["expert_tokens_max_over_mean"] <= 4  # 8 experts, 2 of them for each token
    quantized = runner.good("moe-qlora", train_case(**moe, method="qlora")).one("proof")["quantization"]
    assert (quantized["experts_4bit"], quantized["plain_experts"]) == (4, 0)


# ---------------------------------------------------------------- several cases in one process


def test_cases_that_share_a_process_measure_what_each_measures_alone(runner: Runner) -> None:
    cases = (train_case(seq_len=32), train_case(), train_case(lora_targets=("gate_proj",)), train_case(seq_len=96))
    job = launch.jobs(cases, 1)[0]
    job_dir = runner.folder / "shared"
    job_dir.mkdir()
    (job_dir / "job.json").write_text(json.dumps(job.payload))
    ran = runner.call(job_dir, job.argv[1:], job.env)
    assert ran.exit_code != 0  # the third fails, and what follows is left to a fresh process
    first, warm, failed, left = (Ran(job_dir / "cases" / case_id(case), 0, "") for case in cases)
    assert not left.job_dir.exists()
    assert failed.one("error")["type"] == "TargetError"
    assert not failed.of("step")
    alone = runner.good("alone", cases[1])
    same_steps(warm, alone)
    assert warm.one("eval")["loss"] == alone.one("eval")["loss"]
    assert warm.one("reload")["ok"] is True
    assert [step["step_time_s"] is None for step in warm.of("step")] == [True, False, False, False]
    assert [ran.one("start")["earlier_cases"] for ran in (first, warm, alone)] == [0, 1, 0]
    assert {memory["peak_rss_bytes"] is None for memory in warm.of("memory")} == {True}
    assert all(memory["peak_rss_bytes"] for memory in first.of("memory"))
    assert not (warm.job_dir / "artifacts").exists()
    assert len(ran.of("alive")) > 20


# ---------------------------------------------------------------- two ranks


def test_ddp_keeps_ranks_apart(ddp: Ran) -> None:
    proof = ddp.one("proof")
    assert (proof["sharding"]["wrapper"], proof["sharding"]["world_size"]) == ("DistributedDataParallel", 2)
    first, second = ddp.of("step", 0)[0], ddp.of("step", 1)[0]
    assert first["loss"] != second["loss"]
    assert first["grad_norm"] == second["grad_norm"]
    assert [len(ddp.of("save", rank)) for rank in (0, 1)] == [1, 0]
    assert ddp.one("start", 1)["local_rank"] == 1


def test_fsdp_really_shards_and_its_gradients_equal_ddp(runner: Runner, ddp: Ran) -> None:
    ran = runner.good("fsdp", train_case(method="full", devices=2, strategy="fsdp", grad_accum=2))
    for rank in (0, 1):
        proof = ran.one("proof", rank)
        assert proof["sharding"]["plain_parameters"] == 0
        assert proof["sharding"]["dtensor_parameters"] > 30
        assert proof["sharding"]["mesh_size"] == 2
        assert sum(proof["bytes_by_dtype_and_class"].values()) < sum(
            ddp.one("proof")["bytes_by_dtype_and_class"].values()) * 0.6  # fmt: skip
    same_steps(ran, ddp)
    assert ran.one("reload")["ok"] is True
    said = python(runner, ran.job_dir, """
import json
from transformers import AutoModelForCausalLM
_, info = AutoModelForCausalLM.from_pretrained("artifacts/checkpoint-4", output_loading_info=True)
print(json.dumps({name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}))
""")  # fmt: skip
    assert said == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}


def same_steps(ran: Ran, other: Ran) -> None:
    for ours, theirs in zip(ran.of("step"), other.of("step"), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_fsdp_shards_experts_and_adapters_from_drawn_and_from_saved_weights_alike(runner: Runner) -> None:
    asked = {"variant": "tiny-moe", "devices": 2, "steps": 2, "lora_targets": ("in_proj", "experts.up_proj")}
    whole = runner.good("moe-ddp", train_case(**asked, strategy="ddp"))
    drawn = runner.good("moe-fsdp", train_case(**asked, strategy="fsdp"))
    # A case that keeps its adapter for serving saves its random base first, and every rank reads its rows of that.
    saved = runner.good("moe-fsdp-saved", train_case(**asked, strategy="fsdp"), keep="merged")
    for ran in (drawn, saved):
        same_steps(ran, whole)
        assert ran.one("proof")["adapter"]["targets"] == ["experts.up_proj", "in_proj"]
        assert ran.one("reload")["checks"] == {"files": True, "shapes": True, "tokenizer": True, "logits": True}
    assert "model.safetensors" in names(saved.job_dir / "artifacts/merged")


LOAD_SHARDED = """
import json, sys
import torch.distributed as dist
import harness.payload.trainer  # the libraries that a case imports before it loads
from harness.payload import model, shard
from harness.payload.meter import rss_bytes
job = json.loads(sys.argv[1])
dist.init_process_group("gloo")
dist.barrier()
parts = [sum(p.numel() * 4 for p in part.parameters())
         for _, part in model.units(model.build(job["case"], job["variant"], "meta"))]
before = rss_bytes()
open("/proc/self/clear_refs", "w").write("5")
found = shard.load(job["case"], job["variant"], None, "cpu")
grown = rss_bytes("VmHWM") - before
own = sum(p.to_local().numel() * 4 for p in found.parameters())
print(json.dumps({"grown": grown, "own": own, "largest": max(parts), "whole": sum(parts)}), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_no_rank_ever_holds_the_whole_model_while_it_loads(runner: Runner) -> None:
    """By the peak of each process: the memory of a model of 400 MB, in parts of 34 MB, on two ranks."""
    case = train_case(method="full", devices=2, strategy="fsdp").model_dump(mode="json")
    variant = catalog.variant("tiny-hybrid").payload()
    config = {**variant["config"], "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 14,
              "hybrid_override_pattern": "M*" + "-" * 12}  # fmt: skip
    argument = json.dumps({"case": case, "variant": {**variant, "config": config}})
    folder = runner.folder / "sharding"
    folder.mkdir()
    (folder / "load.py").write_text(LOAD_SHARDED)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "load.py", argument)
    ran = runner.call(folder, launcher, {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert ran.exit_code == 0, ran.output
    ranks = [json.loads(line) for line in ran.output.splitlines() if line.startswith('{"grown"')]
    assert len(ranks) == 2
    for said in ranks:
        assert said["whole"] > 400e6
        assert said["own"] < 0.51 * said["whole"]
        # To hold it whole for a moment would take `whole` on top of its own part.
        assert said["own"] <= said["grown"] < said["whole"]


OFFLOADED = """
import json
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from harness.payload import shard
torch.cuda.set_device = lambda number: None  # there is none here
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
unit = torch.nn.Linear(3, 4, bias=False, device="meta")
own = DTensor.from_local(unit.weight.detach(), init_device_mesh("cuda", (1,)), [Shard(0)], run_check=False)
unit.weight = torch.nn.Parameter(own)
shard._fill(unit, {"weight": lambda start, stop: torch.ones(4, 3)[start:stop]}, "cuda:0", offloaded=True)
filled = unit.weight
total = filled.to_local().sum().item()
print(json.dumps({"on": filled.device.type, "of": filled.device_mesh.device_type, "sum": total}))
"""


def test_offloaded_shards_are_filled_on_the_host_though_their_mesh_is_of_gpus(runner: Runner) -> None:
    """FSDP2 refuses to start where one of them says that it lies on a GPU."""
    assert python(runner, runner.folder, OFFLOADED) == {"on": "cpu", "of": "cuda", "sum": 12.0}


MASTERS = """
import json, sys
import torch
import torch.distributed as dist
from harness.payload import model, shard
job = json.loads(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
found = shard.load(job["case"], job["variant"], None, "cpu")
seen = []
found.model.layers[1].register_forward_pre_hook(lambda block, _: seen.extend(p.dtype for p in block.parameters()))
model.add_loss_head(found)
ids = torch.arange(16, 80)[None]
with torch.autocast("cpu", torch.bfloat16):
    loss = model.loss(found, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
loss.backward()
kept = list(found.parameters())
said = {"gathered": seen, "kept": [p.dtype for p in kept], "grads": [p.grad.dtype for p in kept]}
print(json.dumps({name: sorted(map(str, set(dtypes))) for name, dtypes in said.items()}))
"""


def test_fp32_master_weights_are_gathered_in_bf16_and_their_gradients_reduced_in_fp32(runner: Runner) -> None:
    """Autocast would keep a bf16 copy of each gathered weight until the forward ends: the whole model on every rank."""
    case = {**train_case(method="full", devices=2, strategy="fsdp").model_dump(mode="json"), "device": "cuda"}
    argument = json.dumps({"case": case, "variant": catalog.variant("tiny-hybrid").payload()})
    assert python(runner, runner.folder, MASTERS, argument) == {
        "gathered": ["torch.bfloat16"], "kept": ["torch.float32"], "grads": ["torch.float32"]}  # fmt: skip


# ---------------------------------------------------------------- what ends a case


def test_a_bad_data_line_ends_the_case_before_the_libraries_load(runner: Runner) -> None:
    path = runner.folder / "bad.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"m\n')
    ran = runner.start("bad-data", train_case(data=str(path)))
    error = ran.one("error")
    assert ran.exit_code != 0
    assert (error["phase"], error["type"]) == ("data", "DataError")
    assert f"{path}, line 2: broken JSON" in error["message"]
    assert ran.of("start") == []


def test_a_signal_leaves_the_stacks_of_a_rank_that_hangs(runner: Runner) -> None:
    job_dir = runner.folder / "stacks"
    job_dir.mkdir()
    os.mkfifo(job_dir / "job.json")  # nobody writes into it: the payload waits for ever
    argv = [runner.python, "-m", "harness.payload.train", "job.json"]
    process = subprocess.Popen(argv, cwd=job_dir, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        wait_for(lambda: "alive" in text_of(job_dir / "events.rank0.jsonl"))
        process.send_signal(signal.SIGUSR1)
        wait_for(lambda: "in main" in text_of(job_dir / "stacks.rank0.txt"))
    finally:
        process.kill()
        process.wait()


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_own_data_is_padded_within_a_batch_and_counted(runner: Runner) -> None:
    path = runner.folder / "own.jsonl"
    texts = ["short", "a much longer answer that has many more tokens than the other one"]
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]} for text in texts]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    ran = runner.good("own-data", train_case(data=str(path), micro_batch=4, steps=2, seq_len=64, thinking=False))
    assert any(step["tokens"] < step["padded_tokens"] for step in ran.of("step"))
    shown = json.loads((ran.job_dir / "samples.json").read_text())
    assert [sample["messages"][-1]["content"] for sample in shown["samples"]] == texts


def test_a_target_that_matches_nothing_is_named_beside_what_exists(runner: Runner) -> None:
    ran = runner.start("bad-target", train_case(lora_targets=("in_proj", "gate_proj")))
    error = ran.one("error")
    assert ran.exit_code != 0
    assert error["type"] == "TargetError"
    assert "`gate_proj` matches nothing" in error["message"]
    assert "down_proj, in_proj, k_proj" in error["message"]
    assert ran.of("step") == []


def test_a_nan_in_the_weights_ends_the_case_at_its_first_step(runner: Runner, lora: Ran) -> None:
    broken = runner.folder / "broken"
    shutil.copytree(lora.job_dir / "artifacts/base", broken)
    index = json.loads((broken / "model.safetensors.index.json").read_text())["weight_map"]
    put_nan(broken / index["backbone.norm_f.weight"], "norm_f.weight")
    ran = runner.start("nan", train_case(param_dtype="bf16", weights=str(broken)))
    nonfinite, error = ran.one("nonfinite"), ran.one("error")
    assert ran.exit_code != 0
    assert (nonfinite["step"], nonfinite["what"]) == (1, "loss")
    assert (error["type"], error["phase"]) == ("Nonfinite", "train")
    assert "step 1 on rank 0" in error["message"]
    assert ran.one("step")["loss"] == "nan"


def put_nan(path: Path, end_of_name: str) -> None:
    """Overwrite the first bf16 value of a tensor in a safetensors file."""
    content = bytearray(path.read_bytes())
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    (name,) = [name for name in header if name.endswith(end_of_name)]
    assert header[name]["dtype"] == "BF16"
    begin = 8 + size + header[name]["data_offsets"][0]
    content[begin : begin + 2] = b"\xc0\x7f"
    path.write_bytes(content)


# ---------------------------------------------------------------- the model, without a trainer

MODEL = """
import copy, json, math, torch
from harness.payload import model as M, proof
job = json.load(open("job.json"))
case, variants = {**job["case"], "steps": 1}, job["variants"]
tiny = variants["tiny-hybrid"]
out = {}
out["meta"] = {name: sum(p.numel() for p in M.build(case, variant, "meta").parameters())
               for name, variant in variants.items()}

model = M.build(case, tiny, "cpu")
twin = M.build(case, tiny, "cpu")
out["repeatable"] = all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
mixer = model.model.layers[0].mixer
reference = M.NemotronHForCausalLM(M.config(case, tiny)).model.layers[0].mixer
out["a_log"] = torch.equal(mixer.A_log, reference.A_log)
out["d"] = torch.equal(mixer.D, reference.D)
out["dt"] = bool((mixer.dt_bias.isfinite().all() and mixer.dt_bias.std() > 0).item())
whole = dict(M.NemotronHForCausalLM(M.config(case, tiny)).named_parameters())
out["std"] = {n: p.std().item() / whole[n].std().item() for n, p in model.named_parameters() if p.dim() > 1}
out["finite"] = all(bool(t.isfinite().all()) for t in model.state_dict().values())
moe = M.build({**case, "param_dtype": "bf16"}, variants["tiny-moe"], "cpu")
out["bias"] = str(next(b for n, b in moe.named_buffers() if "correction" in n).dtype)

ids = torch.randint(20, 900, (2, 48))
labels = ids.clone(); labels[0, :10] = -100
plain = model(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids)).loss.item()
M.add_loss_head(model)
fused = M.loss(model, {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}).item()
out["loss"] = [plain, fused]

def wrong(**changes):
    subject = M.adapt(M.build(case, tiny, "cpu"), case)
    subject.train()
    subject.get_base_model().gradient_checkpointing_enable()
    M.add_loss_head(subject)
    asked = {**case, **changes}
    return proof.examine(subject, M.optimizer(subject, case), asked, tiny)["mismatches"]

changes = [{}, {"method": "full"}, {"method": "qlora"}, {"param_dtype": "bf16"}, {"strategy": "fsdp", "devices": 2},
           {"strategy": "ddp"}, {"attention": "eager"}, {"optimizer": "adamw_8bit"}, {"lora_rank": 8},
           {"activation_checkpointing": False}, {"lora_targets": ["in_proj", "q_proj", "out_proj"]}]
out["mismatches"] = [[" ".join(f"{key}={value}" for key, value in change.items()), wrong(**change)]
                     for change in changes]
print(json.dumps(out))
"""


def test_model_and_proof(runner: Runner) -> None:
    """One process for all that needs torch but no trainer: each start costs seconds of imports."""
    folder = runner.folder / "model"
    folder.mkdir()
    case = train_case(optimizer="adamw_torch").model_dump(mode="json")
    variants = {name: variant.payload() for name, variant in catalog.variants().items()}
    (folder / "job.json").write_text(json.dumps({"case": case, "variants": variants}))
    said = python(runner, folder, MODEL)

    assert said["meta"] == {name: variant.parameters for name, variant in catalog.variants().items()}
    assert said["repeatable"]
    assert said["finite"]
    assert said["a_log"], "A_log is not what the model's own init gives"
    assert said["d"]
    assert said["dt"]
    assert said["bias"] == "torch.float32"
    assert {name: ratio for name, ratio in said["std"].items() if not 0.9 < ratio < 1.1} == {}
    assert said["loss"][0] == pytest.approx(said["loss"][1], rel=1e-5)

    found = dict(said["mismatches"])
    assert found.pop("") == []
    assert {name for name, sentences in found.items() if not sentences} == set()
    assert "a full fine-tune was asked, but an adapter is attached" in found["method=full"]
    assert any(sentence.startswith("NF4 was asked") for sentence in found["method=qlora"])
    assert any("parameters are not sharded" in sentence for sentence in found["strategy=fsdp devices=2"])
    assert found["strategy=ddp"] == ["strategy ddp was asked, but the model is not wrapped in DDP"]
    assert found["optimizer=adamw_8bit"] == ["optimizer adamw_8bit was asked, but AdamW (fused: False) is set"]
    (targets,) = (sentences for asked, sentences in found.items() if asked.startswith("lora_targets"))
    assert "LoRA target `out_proj` was asked, but 2 of its 2 places lack one" in targets
