"""Cases -> jobs: argv, environment variables, small files and limits. Pure: a test reads the result as text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from pydantic import JsonValue
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from harness import catalog
from harness.schema import (
    LOAD_FIELDS,
    AnyCase,
    ChainCase,
    DeviceType,
    EnvironmentName,
    Job,
    Mount,
    ProbeCase,
    ServeCase,
    TrainCase,
    case_id,
    fingerprint,
)

Case = AnyCase

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
"""Cases run with the network off: a run that downloads is no measurement."""

COMMON = {
    **OFFLINE,
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
}

ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
"""A CPU case must not find the GPU of the machine that it happens to run on."""

EAGER_ON_CPU = {"TORCHDYNAMO_DISABLE": "1"}
"""vLLM compiles some functions by decorator whatever `enforce_eager` says; on a CPU that needs a C++ compiler, which no
image of ours has (seen, vLLM 0.32, an adapter on tiny-hybrid)."""

ONE_HOST = {"GLOO_SOCKET_IFNAME": "lo"}
"""The ranks share a host: no look-up of its name, which fails on many. Ranks with GPUs have gloo too, for what lies on
the host: offloaded shards, and vLLM's messages."""

GPU_RANKS = {
    "NCCL_DEBUG": "INFO",
    "NCCL_DEBUG_SUBSYS": "INIT,ENV,NET,GRAPH",
    "NCCL_DEBUG_FILE": "nccl.%h.%p.log",
    # Flight Recorder: the last 2,000 collectives of each rank, written where one times out, or where the supervisor
    # of a stalled job asks for them through the pipe.
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "nccl_trace_rank_",
    "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": "nccl_trace_rank_",
}
"""NCCL's log and PyTorch's Flight Recorder, in the job's directory.

Source: NCCL's documentation; torch 2.11 to 2.13, ProcessGroupNCCL.hpp and FlightRecorder.hpp.
"""

PROBE_DEBUG: dict[DeviceType, dict[str, str]] = {
    # Every collective is compared between ranks before it runs, which costs speed.
    "cpu": {"TORCH_DISTRIBUTED_DEBUG": "DETAIL", "TORCH_CPP_LOG_LEVEL": "INFO"},
    # TUNING names the algorithm, protocol and channels of each size. DETAIL would time the host instead of the GPUs.
    "cuda": {"TORCH_DISTRIBUTED_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,ENV,NET,GRAPH,P2P,SHM,TUNING"},
}
"""What a probe with `debug` adds to what several ranks always have."""

THREADS_ALONE = {"cpu": "2", "cuda": "8"}
"""OMP_NUM_THREADS of a single rank. Fixed, so that one case means the same on every machine; 2 is the smallest host."""
THREADS_TOGETHER = {"cpu": "1", "cuda": "8"}
"""OMP_NUM_THREADS of each of several ranks."""

ACCELERATE_FILE = "accelerate.yaml"


def group(cases: Iterable[Case], share: bool = False) -> list[tuple[Case, ...]]:
    """Cases that one process measures together, all others alone, in order of first sight.

    Those that one server serves (equal but for their load) always; with `share` training cases of one process key too.
    """
    groups: dict[str, list[Case]] = {}
    for case in cases:
        key = _serve_id(case) if isinstance(case, ServeCase) else case_id(case)
        if share and isinstance(case, TrainCase):
            key = process_key(case) or key
        groups.setdefault(key, []).append(case)
    return [tuple(found) for found in groups.values()]


def process_key(case: TrainCase) -> str | None:
    """Equal for cases that may follow each other in one process; `None` for one that needs a process of its own.

    Ranks that talk to each other and allocators that are held to a cap do not start afresh within a process; a disk
    is given to a whole job.
    """
    alone = case.memory_cap_gib is not None or case.checkpoints == "local"
    if case.devices > 1 or case.strategy != "none" or alone:
        return None
    return f"shared-{case.variant}-{case.method}-{case.param_dtype}-{case.device}-{fingerprint(case.weights)}"


def jobs(cases: tuple[Case, ...], attempt: int) -> tuple[Job, ...]:
    """The jobs of one group, in the order to run them: one, or for a chain its training and then its serving.

    `attempt` counts from 1; a job's directory is `<job id>.<attempt>`, and a chain's second job finds the first by it.
    """
    first = cases[0]
    together = [case for case in cases if isinstance(case, TrainCase)]
    if len(together) > 1:
        return (_shared_job(together),)
    if isinstance(first, TrainCase):
        return (_train_job(first, case_id(first), case_id(first), "none"),)
    if isinstance(first, ServeCase):
        loads = [(case_id(case), case) for case in cases if isinstance(case, ServeCase)]
        return (_serve_job(loads, _serve_id(first), _own_model(first)),)
    if isinstance(first, ProbeCase):
        return (_probe_job(first),)
    return _chain_jobs(first, attempt)


def _chain_jobs(case: ChainCase, attempt: int) -> tuple[Job, ...]:
    name = case_id(case)
    keep = "merged" if case.serve.adapter == "merged" else "adapter"
    train = _train_job(case.train, f"{name}-train", name, keep)
    trained = _trained_model(case, f"../{train.id}.{attempt}/artifacts")
    return train, _serve_job([(name, case.serve)], f"{name}-serve", trained)


def _train_job(case: TrainCase, job_id: str, named: str, keep: str) -> Job:
    payload: dict[str, JsonValue] = {
        "job_id": job_id,
        "role": "train",
        "case_id": named,
        "case": case.model_dump(mode="json"),
        "variant": catalog.variant(case.variant).payload(),
        "keep": keep,
    }
    return Job(
        id=job_id,
        environment="train",
        case_ids=(named,),
        argv=_train_argv(case),
        env=_env(case.device, case.devices, "train", case.nodes),
        mounts=_mounts(case.weights, case.data),
        device=case.device,
        devices=case.devices,
        nodes=case.nodes,
        time_limit_s=case.time_limit_s,
        stall_s=case.stall_s,
        local_artifacts=case.checkpoints == "local",
        files={} if by_torchrun(case) else {ACCELERATE_FILE: accelerate_config(case)},
        payload=payload,
    )


def _shared_job(cases: Sequence[TrainCase]) -> Job:
    """Training cases of one process key, one after the other in one process (`payload/shared.py`)."""
    ids = tuple(case_id(case) for case in cases)
    name = f"{process_key(cases[0])}-{fingerprint(ids)}"
    alone = _train_job(cases[0], name, ids[0], "none")
    payload: dict[str, JsonValue] = {
        "job_id": name,
        "role": "train",
        "cases": [{"id": found, "case": case.model_dump(mode="json")} for found, case in zip(ids, cases, strict=True)],
        "variant": alone.payload["variant"],
    }
    changes = {
        "case_ids": ids,
        "argv": tuple("harness.payload.shared" if word == "harness.payload.train" else word for word in alone.argv),
        "mounts": tuple(dict.fromkeys(mount for case in cases for mount in _mounts(case.weights, case.data))),
        "time_limit_s": sum(case.time_limit_s for case in cases),
        "stall_s": max(case.stall_s for case in cases),
        "payload": payload,
    }
    return alone.model_copy(update=changes)


def _serve_job(cases: Sequence[tuple[str, ServeCase]], job_id: str, model: dict[str, JsonValue]) -> Job:
    first = cases[0][1]
    payload: dict[str, JsonValue] = {
        "job_id": job_id,
        "role": "serve",
        "cases": [{"id": name, "case": case.model_dump(mode="json")} for name, case in cases],
        "variant": catalog.variant(first.variant).payload(),
        "model": model,
    }
    return Job(
        id=job_id,
        environment="serve",
        case_ids=tuple(name for name, _ in cases),
        argv=("python", "-m", "harness.payload.serve", "job.json"),
        env=_env(first.device, first.devices, "serve") | (EAGER_ON_CPU if _eager_on_cpu(first) else {}),
        mounts=_mounts(first.weights, first.adapter),
        device=first.device,
        devices=first.devices,
        # One start serves them all, and each brings the time it may take.
        time_limit_s=sum(case.time_limit_s for _, case in cases),
        stall_s=max(case.stall_s for _, case in cases),
        payload=payload,
    )


def _probe_job(case: ProbeCase) -> Job:
    name = case_id(case)
    payload: dict[str, JsonValue] = {"job_id": name, "role": "probe", "case": case.model_dump(mode="json")}
    return Job(
        id=name,
        environment="train",
        case_ids=(name,),
        argv=(*_torchrun(case.devices, case.nodes), "-m", "harness.payload.probe", "job.json"),
        env=_env(case.device, case.devices, "train", case.nodes) | _probe_env(case),
        device=case.device,
        devices=case.devices,
        nodes=case.nodes,
        time_limit_s=case.time_limit_s,
        stall_s=case.stall_s,
        payload=payload,
    )


def _probe_env(case: ProbeCase) -> dict[str, str]:
    """What a probe pins: the interface of both libraries' sockets, the way between GPUs, how much the libraries say."""
    found: dict[str, str] = {}
    if case.interface:
        # NCCL takes a bare name for the beginning of one.
        found |= {"GLOO_SOCKET_IFNAME": case.interface, "NCCL_SOCKET_IFNAME": f"={case.interface}"}
    if not case.p2p:
        found["NCCL_P2P_DISABLE"] = "1"
    if case.debug:
        found |= PROBE_DEBUG[case.device]
    return found


def _eager_on_cpu(case: ServeCase) -> bool:
    return case.device == "cpu" and case.enforce_eager


def _train_argv(case: TrainCase) -> tuple[str, ...]:
    script = ("-m", "harness.payload.train", "job.json")
    if case.nodes > 1:
        return (*_node_launcher(case), *script)
    if not by_torchrun(case):
        tee = ("--log_dir", "logs", "--tee", "3") if case.devices > 1 else ()
        return ("python", "-m", "accelerate.commands.launch", "--config_file", ACCELERATE_FILE, *tee, *script)
    return (*_torchrun(case.devices), *script)


def by_torchrun(case: TrainCase) -> bool:
    """Does PyTorch's own launcher start the ranks: on a CPU, and where the payload shards the model itself."""
    return case.device == "cpu" or catalog.strategies()[case.strategy].accelerate is None


def _torchrun(ranks: int, nodes: int = 1) -> tuple[str, ...]:
    """torchrun of these ranks; on several nodes by its c10d rendezvous, held by the first of them."""
    launcher = ("python", "-m", "torch.distributed.run")
    if nodes == 1:
        # As for ONE_HOST: else torchrun hands the ranks the host's name to meet at.
        own = ("--standalone", "--local-addr=127.0.0.1")
        return (*launcher, *own, f"--nproc_per_node={ranks}", "--log-dir", "logs", "--redirects", "3")
    meeting = ("--rdzv_backend=c10d", "--rdzv_endpoint={head}:{port}", "--rdzv_id={meeting}")
    spread = (f"--nnodes={nodes}", f"--nproc_per_node={ranks // nodes}")
    return (*launcher, *spread, *meeting, "--log_dir", "logs/{node}", "--redirects", "3")


def _node_launcher(case: TrainCase) -> tuple[str, ...]:
    """What runs once on each of several nodes.

    accelerate takes the address and this node's number by its own options, and hands all of it to torchrun.
    """
    if not by_torchrun(case):
        place = ("--machine_rank", "{node_rank}", "--main_process_ip", "{head}", "--main_process_port", "{port}")
        launcher = ("python", "-m", "accelerate.commands.launch", "--config_file", ACCELERATE_FILE)
        return (*launcher, *place, "--log_dir", "logs/{node}", "--tee", "3")
    return _torchrun(case.devices, case.nodes)


def accelerate_config(case: TrainCase) -> str:
    """The text of the file that `accelerate launch --config_file` takes, for the GPUs of each host.

    Where fp32 values are trained (adapters, or master weights), bf16 is computed by autocast. A full fine-tune of bf16
    parameters needs no cast.
    """
    casts = case.method != "full" or case.param_dtype == "fp32"
    content: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        **(catalog.strategies()[case.strategy].accelerate or {}),
        "mixed_precision": "bf16" if casts else "no",
        "num_machines": case.nodes,
        "num_processes": case.devices,
        "machine_rank": 0,
        # Any free port: several cases share a host.
        "main_process_port": 0,
        "main_training_function": "main",
        "rdzv_backend": "static" if case.nodes == 1 else "c10d",
        # Not as one network: accelerate 1.15 then gives torchrun an endpoint instead of a fixed master.
        "same_network": case.nodes == 1,
        "use_cpu": False,
        "debug": False,
        "enable_cpu_affinity": False,
    }
    text = io.StringIO()
    YAML().dump(_quoted(content), text)
    return text.getvalue()


def _quoted(value: Any) -> Any:
    """`value` with its strings in quotes: accelerate reads YAML 1.1, where a bare `no` is false."""
    if isinstance(value, dict):
        return {name: _quoted(item) for name, item in value.items()}
    return DoubleQuotedScalarString(value) if isinstance(value, str) else value


def _env(device: DeviceType, ranks: int, environment: EnvironmentName, nodes: int = 1) -> dict[str, str]:
    found = dict(COMMON)
    if environment == "train":
        found["OMP_NUM_THREADS"] = (THREADS_ALONE if ranks == 1 else THREADS_TOGETHER)[device]
    if device == "cpu":
        found |= ON_CPU
    if ranks > 1:
        found |= (GPU_RANKS if device == "cuda" else {}) | (ONE_HOST if nodes == 1 else {})
    return dict(sorted(found.items()))


def _serve_id(case: ServeCase) -> str:
    """A name for the server that `case` needs; equal for cases that differ in their load alone."""
    engine = case.model_dump(mode="json", exclude=set(LOAD_FIELDS))
    defaults = {name: field.default for name, field in ServeCase.model_fields.items() if not field.is_required()}
    different = {name: value for name, value in engine.items() if name not in defaults or value != defaults[name]}
    return f"serve-{case.variant}-tp{case.tensor_parallel}-{fingerprint(different)}"


def _own_model(case: ServeCase) -> dict[str, JsonValue]:
    """Paths of what a serving case brings along; the payload makes or finds the base itself."""
    return {"base": None, "adapter": case.adapter if _is_path(case.adapter) else None, "merged": None}


def _trained_model(case: ChainCase, artifacts: str) -> dict[str, JsonValue]:
    """Paths of what a chain's training leaves, relative to the serving job's directory."""
    merged = case.serve.adapter == "merged"
    return {
        "base": f"{artifacts}/base" if case.train.weights == "random" else None,
        "adapter": None if merged else f"{artifacts}/adapter",
        "merged": f"{artifacts}/merged" if merged else None,
    }


def _is_path(value: str) -> bool:
    return PurePosixPath(value).is_absolute()


def _mounts(*values: str) -> tuple[Mount, ...]:
    """Host paths among `values`, each once."""
    return tuple(Mount(path=value) for value in dict.fromkeys(values) if _is_path(value))
