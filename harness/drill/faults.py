"""The faults as data: `faults.yaml` -> frozen values, and the jobs that make them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from ruamel.yaml import YAML

from harness import launch
from harness.catalog import nearest, variant
from harness.errors import HarnessError
from harness.schema import Culprit, DeviceType, EnvironmentName, Frozen, Job, TrainCase, asked_for

FILE = Path(__file__).parent / "faults.yaml"
SPARE_S = 20.0
"""What a job may take beyond its program's limit: to start, and to end what is left."""

JOB = {
    "variant": "tiny-hybrid", "device": "cpu", "param_dtype": "fp32", "method": "lora", "seq_len": 64, "steps": 6,
    "warmup_steps": 1, "micro_batch": 2, "learning_rate": 2e-3, "optimizer": "adamw_torch",
}  # fmt: skip
"""The training job that faults are planted into."""

DEBUG = {
    "cpu": {"TORCH_DISTRIBUTED_DEBUG": "INFO", "TORCH_CPP_LOG_LEVEL": "INFO", "DRILL_RECORD": "1"},
    "cuda": {
        "TORCH_DISTRIBUTED_DEBUG": "INFO",
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "INIT,ENV,NET",
        "NCCL_DEBUG_FILE": "nccl.%h.%p.log",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "nccl_trace_rank_",
        "DRILL_RECORD": "1",
    },
}
"""What a person sets to learn more; most have none of it. Source: PyTorch's and NCCL's documentation."""

DETAIL = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
"""Only where ranks may differ: DDP on a CPU crashes under it (seen, torch 2.13: signal 11 in `_ddp_init_helper`)."""

ALWAYS = {
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
    # A time-out of seconds needs a watchdog that looks as often: ProcessGroupNCCL.hpp.
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "2000",
    "TORCH_NCCL_COORD_CHECK_MILSEC": "500",
}


class Shown(Frozen):
    """What a log can show at best where it cannot show what was done."""

    failure_class: str
    culprit: Culprit | None = None
    why: str

    @model_validator(mode="before")
    @classmethod
    def _names(cls, entry: dict[str, Any]) -> dict[str, Any]:
        return _named(entry)


class Fault(Frozen):
    """One entry of `faults.yaml`; its head says what each field means."""

    name: str
    done: str
    failure_class: str
    culprit: Culprit | None = None
    device: DeviceType = "cpu"
    gpus: int = 1
    environment: EnvironmentName = "train"
    program: str = ""
    job: dict[str, Any] | None = None
    plant: dict[str, Any] | None = None
    broken_data: bool = False
    detail: bool = False
    ranks: int = 0
    torchrun: tuple[str, ...] = ()
    prepare: str = ""
    env: dict[str, str] = Field(default_factory=dict)
    signal: dict[str, str] | None = None
    needs: tuple[str, ...] = ()
    limit_s: float = 120.0
    off: Shown | None = None
    shown: Shown | None = None
    alone: bool = False
    quick: bool = False

    @model_validator(mode="before")
    @classmethod
    def _names(cls, entry: dict[str, Any]) -> dict[str, Any]:
        return _named(entry)

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong in it."""
        return self.failure_class == "no_failure"


def _named(entry: dict[str, Any]) -> dict[str, Any]:
    """YAML's `class` under a name that Python allows."""
    return {"failure_class" if name == "class" else name: value for name, value in entry.items()}


@functools.cache
def faults() -> tuple[Fault, ...]:
    """All of them, in the order of the file."""
    return tuple(Fault.model_validate(entry) for entry in YAML(typ="safe").load(FILE))


def chosen(only: str | None, device: DeviceType) -> tuple[Fault, ...]:
    """Those of a device whose name fits one of the shell patterns in `only`, which commas part."""
    found = [one for one in faults() if one.device == device]
    kept = tuple(one for one in found if asked_for(one.name, only))
    if not kept:
        meant = nearest((only or "").split(",")[0], [one.name for one in found])
        raise HarnessError(f"no fault for {device} is called {only!r}{meant}", "harness drill --list names them")
    return kept


def job_of(fault: Fault, debug: bool) -> Job:
    """The job that makes `fault`, as any backend starts it."""
    ours = _training_job(fault) if fault.job is not None else None
    env = {**(ours.env if ours else ALWAYS), **fault.env, "DRILL_DEVICE": fault.device}
    if debug:
        env |= DEBUG[fault.device] | (DETAIL if fault.detail else {})
    order = fault.model_dump(
        mode="json", include={"program", "ranks", "torchrun", "prepare", "signal", "limit_s", "needs"}
    )
    order |= {"env": env, "debug": debug, "argv": _planted(ours.argv) if ours else []}
    return Job(
        id=f"{fault.name}-{'on' if debug else 'off'}",
        environment=fault.environment,
        case_ids=(),
        argv=("python", "-m", "harness.payload.drills.stage", "job.json"),
        env={"PYTHONUNBUFFERED": "1", **({"CUDA_VISIBLE_DEVICES": ""} if fault.device == "cpu" else {})},
        device=fault.device,
        devices=max(1, fault.ranks),
        time_limit_s=fault.limit_s + SPARE_S,
        stall_s=fault.limit_s + SPARE_S,
        files=_data(fault),
        payload={**(ours.payload if ours else {}), "drill": order, "fault": fault.plant},
    )


def _planted(argv: tuple[str, ...]) -> list[str]:
    """The command line of a training job with the module that plants a fault into it, and time for survivors."""
    swapped = {"harness.payload.train": ["harness.payload.drills.job"],
               "torch.distributed.run": ["torch.distributed.run", "--monitor-interval=2"]}  # fmt: skip
    return [new for word in argv[1:] for new in swapped.get(word, [word])]


def _training_job(fault: Fault) -> Job:
    fields = JOB | {"lora_targets": variant(str(JOB["variant"])).lora_targets} | (fault.job or {})
    if fields["method"] == "full":
        fields["lora_targets"] = ()
    if fault.broken_data:
        fields["data"] = "/proc/self/cwd/data.jsonl"  # a path must be absolute, and each rank's is its job directory
    return launch.jobs((TrainCase.model_validate(fields),), 1)[0]


def _data(fault: Fault) -> dict[str, str]:
    """The small files that a fault's job reads."""
    if not fault.broken_data:
        return {}
    turn = '{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}'
    return {"data.jsonl": f"{turn}\n{turn}\n{turn[:-20]}\n{turn}\n"}


Debug = Literal["on", "off", "both"]


def settings(debug: Debug) -> tuple[bool, ...]:
    """Off first: that is how users run."""
    return {"on": (True,), "off": (False,), "both": (False, True)}[debug]
