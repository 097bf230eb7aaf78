"""What a training case needs is checked before it loads: a simulated GPU, and the payload's disk."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import sys
import types
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.payload import train
from harness.schema import Observation, Outcome, TrainCase
from harness.triage import diagnose

GIB = 2**30
CASE = TrainCase(variant="nano-9b-v2", method="lora", seq_len=4096, lora_targets=("in_proj",))


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module on a GPU of 80 GiB, of which `room.outside` bytes are in use outside PyTorch."""
    torch: Any = types.ModuleType("torch")
    names = ("torch", "harness.payload.cap", "harness.payload.room", "pynvml")
    kept = {name: sys.modules.pop(name, None) for name in names}
    sys.modules["torch"], sys.modules["pynvml"] = torch, types.ModuleType("pynvml")  # it has no NVML
    found = importlib.import_module("harness.payload.room")
    found.outside = GIB // 2  # type: ignore[attr-defined]
    torch.empty = lambda size, device: None
    torch.cuda = types.SimpleNamespace(
        mem_get_info=lambda device: (80 * GIB - found.outside, 80 * GIB), memory_reserved=lambda device: 0,
    )  # fmt: skip
    yield found
    for name, module in kept.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def diagnosed(kind: str, message: str) -> str:
    error: Any = {"t": 1.0, "m": 1.0, "rank": 0, "phase": "load", "type": kind, "message": message, "traceback": "",
                  "case_id": None, "file": "events.rank0.jsonl", "line": 3}  # fmt: skip
    found = diagnose(CASE, [Outcome(exit_code=1, start=1, end=2)], Observation(errors=(error,)), "")
    assert found is not None
    return found.failure_class


def test_a_gpu_that_others_use_is_refused_and_said_to_be_taken(room: Any) -> None:
    room.check_gpu("cuda:0")
    room.outside = 58 * GIB
    with pytest.raises(
        RuntimeError, match=r"22\.00 GiB is free before anything is loaded\. Process 0 has 58"
    ) as refused:
        room.check_gpu("cuda:0")
    assert diagnosed("RuntimeError", str(refused.value)) == "oom_gpu_contention"


def test_a_disk_without_room_is_said_before_anything_is_loaded(room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100 * 10**9, 0, 20 * 10**9))
    monkeypatch.setattr(room, "needed_bytes", lambda *_: 18 * 10**9)
    room.check_disk({}, {}, "none")
    monkeypatch.setattr(room, "needed_bytes", lambda *_: 35 * 10**9)
    with pytest.raises(OSError, match=r"this case writes about 35 GB, 20\.0 GB are free") as refused:
        room.check_disk({}, {}, "none")
    assert refused.value.errno == errno.ENOSPC
    assert diagnosed("OSError", str(refused.value)) == "storage_full"


def test_the_disk_asked_for_room_is_that_of_the_artifacts(
    room: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage, asked = namedtuple("usage", "total used free"), []

    def look(path: str) -> Any:
        asked.append(Path(path).resolve())
        return usage(100, 0, 100)

    monkeypatch.setattr(shutil, "disk_usage", look)
    monkeypatch.setattr(room, "needed_bytes", lambda *_: 1)
    job, disk = tmp_path / "job", tmp_path / "disk"
    job.mkdir()
    disk.mkdir()
    monkeypatch.chdir(job)
    room.check_disk({}, {}, "none")
    (job / "artifacts").symlink_to(disk)
    room.check_disk({}, {}, "none")
    assert asked == [job, disk]


@pytest.mark.parametrize(
    ("changes", "keep", "copies"),
    [({}, "none", 0), ({}, "adapter", 1), ({}, "merged", 2), ({"method": "full"}, "none", 3),
     ({"method": "full", "optimizer": "adamw_8bit"}, "none", 2), ({"method": "full", "strategy": "fsdp"}, "none", 1),
     ({"weights": "/models/own"}, "adapter", 0)],
)  # fmt: skip
def test_what_is_written_follows_from_the_case(
    room: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], keep: str, copies: int
) -> None:
    tensor = types.SimpleNamespace(numel=lambda: 10)
    model = types.SimpleNamespace(parameters=lambda: [tensor, tensor])
    fake = types.SimpleNamespace(build=lambda case, variant, device: model)
    monkeypatch.setitem(sys.modules, "harness.payload.model", fake)
    import harness.payload

    monkeypatch.setattr(harness.payload, "model", fake, raising=False)
    case = {**CASE.model_dump(mode="json"), **changes}
    assert room.needed_bytes(case, {}, keep) == copies * 20 * 2


@pytest.mark.parametrize(
    ("devices", "shown", "left"), [(1, None, "0"), (1, "3,5", "3"), (1, "", ""), (2, "3,5", "3,5"), (2, None, None)]
)
def test_a_single_process_sees_one_gpu(
    monkeypatch: pytest.MonkeyPatch, devices: int, shown: str | None, left: str | None
) -> None:
    """Transformers' Trainer spreads it over all that it sees (DataParallel), whatever the batch."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown or "")
    if shown is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    train.keep_to_own_gpu({"device": "cuda", "devices": devices})
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left
