"""doctor: judges are fed values, probes are fed broken machines, and the whole is bounded in time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from harness import catalog, doctor
from harness.doctor import judge, probe
from harness.doctor.facts import (
    Disk,
    Docker,
    Engines,
    Finding,
    GpuFleet,
    GpuState,
    Holder,
    Host,
    Interface,
    Limit,
    Network,
    Slurm,
)
from harness.errors import HarnessError

GIB = 1024**3
UNLIMITED = Limit(soft=None, hard=None)


def card(**changes: Any) -> GpuState:
    values = {
        "index": 0,
        "name": "NVIDIA H100 80GB HBM3",
        "uuid": "GPU-0",
        "bus_id": "00000000:0F:00.0",
        "total_bytes": 80 * GIB,
        "free_bytes": 79 * GIB + GIB // 2,
        "temperature_c": 40,
        "slowdown_c": 90,
        "ecc_uncorrected": 0,
        "remap_pending": False,
        "remap_failed": False,
        "mig": False,
    }
    return GpuState(**(values | changes))


def fleet(*cards: GpuState, **changes: Any) -> GpuFleet:
    values = {"driver": "580.65.06", "kernel_driver": "580.65.06", "cuda": "13.0"}
    return GpuFleet(gpus=cards, **(values | changes))


def host(**changes: Any) -> Host:
    values = {
        "python": (3, 11, 7),
        "cores": 2,
        "memory_bytes": 8 * GIB,
        "available_bytes": 7 * GIB,
        "shm_bytes": 4 * GIB,
        "shm_free_bytes": 4 * GIB,
        "memlock": UNLIMITED,
        "stack": UNLIMITED,
        "nofile": UNLIMITED,
        "hf_token": True,
    }
    return Host(**(values | changes))


def test_a_finding_that_is_not_ok_without_a_way_to_mend_it_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="what to mend"):
        Finding(topic="disk", status="warn", text="Small.")


def only(findings: list[Finding]) -> Finding:
    (found,) = [finding for finding in findings if finding.status != "ok"]
    return found


# ---------------------------------------------------------------- GPUs


def test_no_driver_is_a_plain_finding_and_not_an_error() -> None:
    found = only(judge.gpus(GpuFleet(problem="NVML Shared Library Not Found")))
    assert found.status == "absent"
    assert "CPU" in found.text


def test_a_driver_that_shows_no_gpu_is_bad() -> None:
    found = only(judge.gpus(GpuFleet(problem="Driver Not Loaded", device_nodes=True)))
    assert found.status == "bad"
    assert "--gpus all" in found.mend


def test_a_library_of_another_version_than_the_kernel_module_asks_for_a_reboot() -> None:
    silent = GpuFleet(problem="RM has detected an NVML/RM version mismatch.", kernel_driver="580.65.06")
    talking = fleet(card(), kernel_driver="570.10.01")
    for found in (only(judge.gpus(silent)), only(judge.gpus(talking))):
        assert (found.status, found.mend.split()[0].rstrip(",")) == ("bad", "Reboot")


def test_a_healthy_host_has_nothing_to_mend() -> None:
    cards = [card(index=index, uuid=f"GPU-{index}") for index in range(8)]
    assert {finding.status for finding in judge.gpus(fleet(*cards))} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [
        ({"remap_failed": True}, "bad", "replaced"),
        ({"remap_pending": True}, "warn", "Reset"),
        ({"ecc_uncorrected": 3}, "warn", "dcgmi"),
        ({"temperature_c": 90}, "bad", "airflow"),
        ({"temperature_c": 86}, "warn", "airflow"),
        ({"slowed_by": ("power brake",)}, "warn", "power"),
        ({"free_bytes": 70 * GIB}, "warn", "nvidia-smi"),
    ],
)
def test_each_trouble_of_a_card_is_named_with_what_to_do(changes: dict[str, Any], status: str, word: str) -> None:
    found = only(judge.gpus(fleet(card(**changes))))
    assert found.status == status
    assert word in found.mend


def test_a_card_that_tells_nothing_of_its_health_is_not_called_healthy() -> None:
    silent = card(ecc_uncorrected=None, remap_pending=None, remap_failed=None, temperature_c=None)
    assert not [finding for finding in judge.gpus(fleet(silent)) if "health" in finding.topic]


def test_a_foreign_process_is_named_with_pid_name_and_size() -> None:
    holder = Holder(pid=4711, name="python3", user="eve", memory_bytes=3 * GIB)
    found = only(judge.gpus(fleet(card(holders=(holder,)))))
    assert found.text == "pid 4711 (python3, eve) holds 3.0 GiB."
    assert found.mend.endswith("kill 4711")


def test_a_process_of_an_earlier_run_is_ended_with_cancel() -> None:
    holder = Holder(pid=1, name="python3", user="me", memory_bytes=None, run="/data/runs/night")
    assert only(judge.gpus(fleet(card(holders=(holder,))))).mend == "harness cancel /data/runs/night"


def test_unlike_cards_want_the_order_of_the_bus() -> None:
    mixed = (card(), card(index=1, name="NVIDIA A100-SXM4-40GB"))
    assert "PCI_BUS_ID" in only(judge.gpus(fleet(*mixed))).mend
    assert {finding.status for finding in judge.gpus(fleet(*mixed, order="PCI_BUS_ID"))} == {"ok"}


# ---------------------------------------------------------------- variants, as the recipe states their needs


@pytest.mark.parametrize(
    ("cards", "free_gb", "status"),
    [(8, 100, "ok"), (8, 10, "warn"), (1, 100, "warn"), (0, 100, "absent")],
)
def test_a_variant_is_judged_by_cards_and_disk(cards: int, free_gb: int, status: str) -> None:
    known = {"nano-30b-a3b": catalog.variant("nano-30b-a3b")}
    here = fleet(*(card(index=index) for index in range(cards)))
    disk = Disk(purpose="weights", folder="/hub", free_bytes=free_gb * 10**9)
    (found,) = judge.variants(known, here, disk)
    assert (found.status, found.topic) == (status, "variant nano-30b-a3b")
    assert ("/hub" in found.mend) == (free_gb < 60)


def test_a_card_too_small_for_the_recipe_is_named() -> None:
    known = {"nano-12b-v2": catalog.variant("nano-12b-v2")}
    here = fleet(*(card(index=index, total_bytes=24 * GIB, free_bytes=24 * GIB) for index in range(8)))
    (found,) = judge.variants(known, here, Disk(purpose="weights", folder="/hub", free_bytes=10**12))
    assert "8 GPU(s) of 26 GB" in found.text


@pytest.mark.parametrize(("free_bytes", "status"), [(10**10, "ok"), (10**6, "bad")])
def test_a_tiny_variant_wants_disk_alone(free_bytes: int, status: str) -> None:
    known = {"tiny-moe": catalog.variant("tiny-moe")}
    (found,) = judge.variants(known, GpuFleet(), Disk(purpose="weights", folder="/hub", free_bytes=free_bytes))
    assert found.status == status


# ---------------------------------------------------------------- host, engines, network


@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [
        ({"shm_bytes": 64 * 1024**2, "shm_free_bytes": 0}, "bad", "--shm-size"),
        ({"shm_bytes": None, "shm_free_bytes": None}, "bad", "mount"),
        ({"shm_free_bytes": 1024}, "warn", "ls -l /dev/shm"),
        ({"memory_bytes": 4 * GIB}, "warn", "8 GB"),
        ({"available_bytes": GIB}, "warn", "kill"),
        ({"cores": 1}, "warn", "2 cores"),
        ({"memlock": Limit(soft=65536, hard=65536)}, "warn", "ulimit -l"),
        ({"stack": Limit(soft=1024, hard=None)}, "warn", "ulimit -s"),
        ({"nofile": Limit(soft=1024, hard=1024)}, "warn", "nofile"),
        ({"hf_token": False}, "absent", "HF_TOKEN"),
    ],
)
def test_each_lack_of_a_host_is_named_with_what_to_do(changes: dict[str, Any], status: str, word: str) -> None:
    found = only(judge.host(host(**changes), has_gpus=True))
    assert found.status == status
    assert word in found.mend


def test_locked_memory_matters_only_with_gpus_and_a_low_soft_file_limit_can_be_raised() -> None:
    limited = host(memlock=Limit(soft=65536, hard=65536), nofile=Limit(soft=1024, hard=1048576))
    assert {finding.status for finding in judge.host(limited, has_gpus=False)} == {"ok"}


@pytest.mark.parametrize(("free_bytes", "status"), [(10**10, "ok"), (10**9, "warn"), (10**7, "bad")])
def test_a_full_disk_is_bad_before_it_is_met(free_bytes: int, status: str) -> None:
    assert judge.runs_disk(Disk(purpose="runs", folder="/r", free_bytes=free_bytes)).status == status


@pytest.mark.parametrize(
    ("docker", "status", "word"),
    [
        (Docker(version=None, problem="Connection refused"), "absent", "dockerd"),
        (Docker(version=None, problem="PermissionError(13, 'Permission denied')"), "warn", "usermod"),
        (Docker(version="28.2.2", runtimes=("runc",)), "warn", "nvidia-ctk"),
        (Docker(version="28.2.2", runtimes=("nvidia", "runc")), "ok", ""),
        (Docker(version="28.2.2", runtimes=("runc",), cdi_devices=2), "ok", ""),
    ],
)
def test_docker_is_judged_by_whether_it_could_run_a_case(docker: Docker, status: str, word: str) -> None:
    found = judge.engines(Engines(docker=docker, commands={"podman": "/usr/bin/podman"}), has_gpus=True)[0]
    assert found.status == status
    assert word in found.mend


def test_slurm_says_what_is_wrong_with_it() -> None:
    assert judge.slurm(Slurm(installed=False)).status == "absent"
    assert "munge" in judge.slurm(Slurm(installed=True, problem="Unable to contact slurm controller")).mend
    assert judge.slurm(Slurm(installed=True, partitions=("gpu* 2 down (null)",))).status == "warn"
    assert judge.slurm(Slurm(installed=True, partitions=("gpu* 2 idle (null)",), idle=True)).status == "ok"


def test_several_interfaces_want_a_name_for_nccl() -> None:
    two = tuple(Interface(name=name, speed_mbit_per_s=10_000, virtual=False) for name in ("eth0", "eth1"))
    bare = Network(interfaces=two, infiniband=("mlx5_0",), peermem=False, socket_ifname=None)
    named = bare.model_copy(update={"socket_ifname": "eth1", "peermem": True})
    assert [finding.status for finding in judge.network(bare, has_gpus=True)] == ["warn", "warn"]
    assert {finding.status for finding in judge.network(named, has_gpus=True)} == {"ok"}
    assert {finding.status for finding in judge.network(bare, has_gpus=False)} == {"ok"}


# ---------------------------------------------------------------- probes


class FakeDriver:
    """NVML with one card that refuses most questions, as old or virtual cards do."""

    NVMLError = pynvml.NVMLError
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = NVML_TEMPERATURE_GPU = 0
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 1

    def __getattr__(self, name: str) -> Any:
        def answer(*_: Any) -> Any:
            known = {
                "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * GIB, free=70 * GIB),
                "nvmlDeviceGetName": b"NVIDIA H100",
                "nvmlDeviceGetUUID": "GPU-1",
                "nvmlDeviceGetPciInfo": SimpleNamespace(busId=b"0000:0F:00.0"),
                "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=2**22 + 1, usedGpuMemory=2**64 - 1)],
                "nvmlDeviceGetCurrentClocksEventReasons": 0xC4,
                "nvmlDeviceGetHandleByIndex": object(),
            }
            if name not in known:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return known[name]

        return answer


def test_what_a_card_does_not_tell_is_unknown_and_not_zero(tmp_path: Path) -> None:
    seen = probe._gpu(FakeDriver(), 0, tmp_path)
    assert (seen.name, seen.bus_id, seen.free_bytes) == ("NVIDIA H100", "0000:0F:00.0", 70 * GIB)
    assert (seen.temperature_c, seen.ecc_uncorrected, seen.remap_pending, seen.mig) == (None, None, None, None)
    assert seen.slowed_by == ("temperature", "power brake")
    assert seen.holders == (Holder(pid=2**22 + 1, name=None, user=None, memory_bytes=None),)


def test_the_kernel_module_names_its_version() -> None:
    open_module = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\nGCC version: 15.3.0"
    )
    closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n"
    assert [probe.kernel_driver(text) for text in (open_module, closed, "")] == ["580.159.04", "535.183.01", None]


def test_a_process_below_the_runs_folder_is_ours(tmp_path: Path) -> None:
    assert probe.run_of(tmp_path / "night/jobs/a.1", tmp_path) == str(tmp_path / "night")
    assert probe.run_of(tmp_path, tmp_path) is None
    assert probe.run_of(Path("/"), tmp_path) is None


def test_the_disk_of_a_folder_that_is_yet_to_be_made_is_its_parents(tmp_path: Path) -> None:
    assert probe.disk("runs", tmp_path / "not/there").free_bytes > 0


def test_sinfo_is_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "sinfo"
    fake.write_text("#!/bin/sh\necho 'gpu*|2|idle~|gpu:8'\necho 'cpu|1|down|(null)'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert probe.slurm() == Slurm(installed=True, partitions=("gpu* 2 idle~ gpu:8", "cpu 1 down (null)"), idle=True)
    fake.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    assert "Unable to contact" in probe.slurm().problem


# ---------------------------------------------------------------- the whole


def test_a_probe_that_hangs_or_fails_is_a_finding_and_holds_up_no_other() -> None:
    stuck = threading.Event()
    began = time.monotonic()
    seen = doctor.ask_all({"disk": stuck.wait, "slurm": lambda: 1 / 0, "host": lambda: 7}, 0.2)
    stuck.set()
    assert time.monotonic() - began < 2
    assert seen.pop("slurm").args == ("division by zero",)
    assert seen == {"host": 7}


def test_silence_names_the_topic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "ask_all", lambda *_: {"slurm": OSError("no such disk")})
    found = doctor.examine(tmp_path, lambda _: ())
    texts = {finding.topic: finding.text for finding in found.findings}
    assert texts["slurm"] == "The probe failed: OSError: no such disk."
    assert texts["gpus"].startswith("The probe did not answer")


def test_an_environment_is_missing_differs_or_is_what_its_lock_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def differences(name: str) -> tuple[str, ...]:
        if name == "train":
            raise HarnessError("the train environment is missing")
        return ("torch 2.12.0 is installed, and the lock says 2.13.0+cpu", "x")

    monkeypatch.setattr(probe, "engines", lambda: Engines(docker=Docker(version=None), commands={}))
    monkeypatch.setattr(probe, "slurm", lambda: Slurm(installed=False))
    found = {finding.topic: finding for finding in doctor.examine(tmp_path, differences).findings}
    assert (found["environment train"].status, found["environment serve"].status) == ("bad", "warn")
    assert found["environment train"].mend.startswith("./tools/setup train")
    assert "torch 2.12.0" in found["environment serve"].text


def test_this_machine_is_examined_within_five_seconds_and_keeps_its_token(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from harness import doctor
began = time.monotonic()
print(doctor.examine(Path(sys.argv[1]), lambda name: ()).model_dump_json())
assert time.monotonic() - began < 5
"""
    env = {"HF_TOKEN": "hf_doNotShowThis", "DOCKER_HOST": "unix:///nonexistent/docker.sock", "PATH": "/usr/bin:/bin"}
    env |= {"PYTHONPATH": str(Path(doctor.__file__).parents[2])}
    argv = [sys.executable, "-c", code, str(tmp_path)]
    answer = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=True).stdout
    found = json.loads(answer)["findings"]
    assert "doNotShowThis" not in answer
    assert {"python", "cores", "memory", "/dev/shm", "disk", "docker", "slurm", "network"} <= {
        f["topic"] for f in found
    }
    assert all(finding["mend"] for finding in found if finding["status"] != "ok")
