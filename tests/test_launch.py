"""Jobs are text: these tests read argv, environment variables, files and limits as a person would."""

from __future__ import annotations

import io
import re
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML
from syrupy.assertion import SnapshotAssertion

from harness import catalog, launch
from harness.schema import ChainCase, Job, Method, ServeCase, Strategy, TrainCase, case_id

TRAIN = TrainCase(variant="nano-9b-v2", method="lora", seq_len=2048, lora_targets=("in_proj",))
SERVE = ServeCase(variant="nano-9b-v2")
TINY = TrainCase(variant="tiny-hybrid", method="lora", seq_len=64, device="cpu", lora_targets=("in_proj",))
TINY_SERVE = ServeCase(variant="tiny-hybrid", device="cpu")


def changed(case: Any, **fields: Any) -> Any:
    return case.model_copy(update=fields)


def job(case: Any) -> Job:
    (only,) = launch.jobs((case,), 1)
    return only


def text(made: Job) -> str:
    """A job as a person reads it: the variant's shape is the catalog's matter, not this snapshot's."""
    lines = [f"id: {made.id}", f"environment: {made.environment}", f"argv: {' '.join(made.argv)}"]
    lines += [f"{name}={value}" for name, value in made.env.items()]
    lines += [f"mount: {mount.path} {'rw' if mount.writable else 'ro'}" for mount in made.mounts]
    lines += [f"{made.device} x {made.devices}, {made.time_limit_s:g} s, stall {made.stall_s:g} s"]
    lines += [f"{name}: {made.payload[name]}" for name in made.payload if name not in ("variant", "job_id")]
    lines += [f"--- {name}\n{content}" for name, content in made.files.items()]
    return "\n".join(lines)


@pytest.mark.parametrize("variant", sorted(catalog.variants()))
def test_job_of_each_variant(variant: str, snapshot: SnapshotAssertion) -> None:
    targets = catalog.variant(variant).lora_targets
    device = "cpu" if variant.startswith("tiny") else "cuda"
    assert text(job(changed(TRAIN, variant=variant, lora_targets=targets, device=device))) == snapshot
    assert text(job(changed(SERVE, variant=variant, device=device))) == snapshot


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_job_of_each_strategy(strategy: str, device: str, snapshot: SnapshotAssertion) -> None:
    devices = 1 if strategy == "none" else 2
    assert text(job(changed(TRAIN, strategy=strategy, devices=devices, device=device))) == snapshot


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_job_of_several_nodes(device: str, snapshot: SnapshotAssertion) -> None:
    found = job(changed(TRAIN, strategy="ddp", devices=4, nodes=2, device=device))
    assert (found.nodes, found.devices) == (2, 4)
    assert "GLOO_SOCKET_IFNAME" not in found.env  # `lo` joins no two hosts
    assert text(found) == snapshot


@pytest.mark.parametrize("method", get_args(Method))
def test_job_of_each_method(method: str, snapshot: SnapshotAssertion) -> None:
    assert text(job(changed(TRAIN, method=method))) == snapshot


def test_jobs_of_a_chain(snapshot: SnapshotAssertion) -> None:
    chain = ChainCase(train=TINY, serve=changed(TINY_SERVE, adapter="merged"))
    assert "\n\n".join(text(each) for each in launch.jobs((chain,), 3)) == snapshot


def test_what_is_served_eagerly_on_a_cpu_compiles_nothing() -> None:
    """No image of ours has a C++ compiler."""
    assert job(changed(TINY_SERVE, enforce_eager=True)).env["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in job(TINY_SERVE).env
    assert "TORCHDYNAMO_DISABLE" not in job(changed(SERVE, enforce_eager=True)).env


# ---------------------------------------------------------------- grouping


def test_serving_cases_that_differ_in_load_share_a_job() -> None:
    cases = [changed(SERVE, concurrency=number, time_limit_s=60.0, stall_s=float(number)) for number in (1, 8, 64)]
    (group,) = launch.group(cases)
    (made,) = launch.jobs(group, 1)
    assert made.case_ids == tuple(case_id(case) for case in cases)
    assert [entry["id"] for entry in made.payload["cases"]] == list(made.case_ids)
    assert (made.time_limit_s, made.stall_s) == (180.0, 64.0)


def test_another_engine_is_another_job() -> None:
    cases = [SERVE, changed(SERVE, max_num_seqs=8), changed(SERVE, concurrency=8), TRAIN, changed(TRAIN, seq_len=4096)]
    groups = launch.group(cases)
    assert [len(group) for group in groups] == [2, 1, 1, 1]
    assert groups[0] == (SERVE, cases[2])
    ids = [made.id for group in groups for made in launch.jobs(group, 1)]
    assert len(set(ids)) == 4


def test_every_case_is_in_one_group() -> None:
    cases = [
        changed(SERVE, concurrency=c, max_model_len=m, repeat=r) for c in (1, 2) for m in (64, 128) for r in (0, 1)
    ]
    groups = launch.group(cases)
    assert sorted(map(case_id, cases)) == sorted(case_id(case) for group in groups for case in group)
    assert len(groups) == 2


def test_a_job_id_does_not_hang_on_the_cases_that_are_left() -> None:
    one, two = SERVE, changed(SERVE, concurrency=8)
    assert launch.jobs((one, two), 1)[0].id == launch.jobs((two,), 2)[0].id


def test_job_ids_are_file_names() -> None:
    chain = ChainCase(train=TRAIN, serve=changed(SERVE, adapter="adapter"))
    for cases in ((TRAIN,), (SERVE,), (chain,)):
        for made in launch.jobs(cases, 1):
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,120}", made.id)


# ---------------------------------------------------------------- content


def test_a_chain_hands_its_artifacts_over() -> None:
    chain = ChainCase(train=TINY, serve=changed(TINY_SERVE, adapter="adapter", time_limit_s=5.0))
    train, serve = launch.jobs((chain,), 2)
    artifacts = f"../{train.id}.2/artifacts"
    assert train.payload["keep"] == "adapter"
    assert serve.payload["model"] == {"base": f"{artifacts}/base", "adapter": f"{artifacts}/adapter", "merged": None}
    assert train.case_ids == serve.case_ids == (case_id(chain),)
    assert (train.time_limit_s, serve.time_limit_s) == (3600.0, 5.0)
    assert (train.environment, serve.environment) == ("train", "serve")


def test_a_chain_on_saved_weights_keeps_no_second_base() -> None:
    chain = ChainCase(
        train=changed(TRAIN, weights="/models/9b"), serve=changed(SERVE, weights="/models/9b", adapter="merged")
    )
    train, serve = launch.jobs((chain,), 1)
    assert train.payload["keep"] == "merged"
    assert serve.payload["model"] == {"base": None, "adapter": None, "merged": f"../{train.id}.1/artifacts/merged"}


def test_paths_that_a_case_needs_are_mounted_to_read() -> None:
    made = job(changed(TRAIN, weights="/models/9b", data="/data/mine.jsonl"))
    assert [(mount.path, mount.writable) for mount in made.mounts] == [
        ("/models/9b", False),
        ("/data/mine.jsonl", False),
    ]
    assert job(TRAIN).mounts == ()
    assert [mount.path for mount in job(changed(SERVE, adapter="/models/mine")).mounts] == ["/models/mine"]
    assert job(changed(SERVE, adapter="/models/mine")).payload["model"] == {
        "base": None, "adapter": "/models/mine", "merged": None,
    }  # fmt: skip


def test_no_job_names_a_path_of_its_own() -> None:
    chain = ChainCase(train=TINY, serve=changed(TINY_SERVE, adapter="merged"))
    for made in (job(TRAIN), job(changed(TRAIN, strategy="fsdp", devices=2)), *launch.jobs((chain,), 1)):
        assert not re.search(r"(?<![\w.:/-])/[a-z]", text(made))


def test_every_job_runs_offline_and_asks_a_bare_python() -> None:
    for made in (job(TRAIN), job(TINY), job(SERVE), job(TINY_SERVE)):
        assert made.argv[0] == "python"
        assert made.env["HF_HUB_OFFLINE"] == "1"
        assert made.env["TOKENIZERS_PARALLELISM"] == "false"


def test_a_cpu_job_sees_no_gpu() -> None:
    assert job(TINY).env["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in job(TRAIN).env


def test_nccl_writes_where_several_gpus_talk() -> None:
    several = job(changed(TRAIN, strategy="ddp", devices=2)).env
    assert several["NCCL_DEBUG"] == "INFO"
    assert not several["NCCL_DEBUG_FILE"].startswith("/")
    assert "NCCL_DEBUG" not in job(TRAIN).env
    assert "NCCL_DEBUG" not in job(changed(TINY, strategy="ddp", devices=2)).env


# ---------------------------------------------------------------- accelerate's configuration


def config(case: TrainCase) -> dict[str, Any]:
    content: dict[str, Any] = YAML(typ="safe").load(io.StringIO(job(case).files[launch.ACCELERATE_FILE]))
    return content


def test_fsdp_is_the_payloads_own_and_not_accelerates() -> None:
    found = job(changed(TRAIN, strategy="fsdp", devices=4))
    assert found.argv[:4] == ("python", "-m", "torch.distributed.run", "--standalone")
    assert "--nproc_per_node=4" in found.argv
    assert not found.files
    assert found.env["NCCL_DEBUG_FILE"]


@pytest.mark.parametrize(
    ("method", "param_dtype", "precision"),
    [("full", "bf16", "no"), ("full", "fp32", "bf16"), ("lora", "bf16", "bf16"), ("qlora", "bf16", "bf16")],
)
def test_fp32_values_are_computed_with_in_bf16(method: str, param_dtype: str, precision: str) -> None:
    assert config(changed(TRAIN, method=method, param_dtype=param_dtype))["mixed_precision"] == precision


def test_words_are_quoted_for_a_reader_of_yaml_1_1() -> None:
    lines = job(changed(TRAIN, method="full")).files[launch.ACCELERATE_FILE].splitlines()
    assert 'mixed_precision: "no"' in lines
    assert 'distributed_type: "NO"' in lines
