"""The sampler as the process it is, with invented GPUs: what it writes, survives and takes, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.observe import telemetry
from harness.payload import nvml, sampler

ROOT = Path(__file__).resolve().parent.parent
FAKE = ROOT / "tests/fakes/fake_pynvml"
GIB = 2**30
Lines = list[dict[str, Any]]
Run = Callable[..., Lines]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Sample for some seconds, end the sampler as a payload does, and read what it wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(FAKE), str(ROOT))))

    def call(duration_s: float = 0.3, devices: int = 2, visible: str | None = None, **plan: Any) -> Lines:
        monkeypatch.setenv("FAKE_NVML", json.dumps(plan))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        sidecar = sampler.start(devices, 0, os.getpid())
        assert sidecar is not None
        wait_for_samples(tmp_path, sidecar)
        time.sleep(duration_s)
        sampler.stop(sidecar)
        return lines(tmp_path)

    return call


def lines(folder: Path) -> Lines:
    path = folder / "gpu.samples.node0.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_samples(folder: Path, sidecar: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until and sidecar.poll() is None:
        if any(line["kind"] == "sample" for line in lines(folder)):
            return
        time.sleep(0.05)


def kinds(found: Lines, kind: str) -> Lines:
    return [line for line in found if line["kind"] == kind]


def notes(found: Lines) -> str:
    return "\n".join(line["text"] for line in kinds(found, "note"))


def test_samples_come_ten_times_a_second_and_slow_values_once(run: Run) -> None:
    found = run(1.6)
    samples = kinds(found, "sample")
    assert 11 <= len(samples) <= 26
    assert all(samples[0]["gpus"][i][0] == (i + 1) * GIB for i in (0, 1))
    slow = [line["slow"] for line in samples if "slow" in line]
    assert 2 <= sum("0" in row for row in slow) <= 5
    assert not any(len(row) > 1 for row in slow), "one GPU at a time, so that its 40 ms do not add up"


def test_what_changes_slowly_is_asked_less_often(run: Run) -> None:
    columns = list(zip(*(line["gpus"][0] for line in kinds(run(1.2), "sample")), strict=True))
    asked = dict(zip(nvml.FAST, ([value is not None for value in column[:10]] for column in columns), strict=True))
    assert all(asked["memory_used_bytes"])
    assert all(asked["power_w"])
    assert all(asked["energy_mj"])
    assert asked["sm_clock_mhz"] == asked["utilisation"] == [True, False] * 5
    assert asked["memory_clock_mhz"] == [True, *[False] * 9]


def test_the_first_line_describes_links_and_names(run: Run) -> None:
    first = run(0.2)[0]
    assert first["kind"] == "gpus"
    assert first["columns"] == list(nvml.FAST)
    described = first["gpus"][0]
    assert (described["index"], described["name"], described["power_limit_w"]) == (0, "NVIDIA H200", 700.0)
    assert described["nvlinks"] == {"gpu 1": 1, "switch": 3}
    assert described["near"] == {"1": "across NUMA nodes"}


def test_what_it_wrote_is_what_a_record_holds(run: Run, tmp_path: Path) -> None:
    samples = kinds(run(1.5), "sample")
    window = telemetry.Window(samples[2]["t"], samples[-2]["t"], 100)
    found = telemetry.read("train", [tmp_path], window)
    uuids = {one.ordinal: one.uuid for one in found.gpus}
    assert uuids == {0: "GPU-0aaaaaaa-0000-0000-0000-000000000000", 1: "GPU-1aaaaaaa-0000-0000-0000-000000000001"}
    assert not found.problems
    for one in found.gpus:
        assert one.steady
        watts = 100 * (one.ordinal + 1)
        assert one.steady.energy_from == "counter"
        assert one.steady.energy_j == pytest.approx(watts * (window.end - window.start), rel=0.05)
        assert one.steady.power_mean_w == watts
        assert one.memory_max_bytes == (one.ordinal + 1) * GIB


@pytest.mark.parametrize(
    ("entries", "expected"),
    [(None, [0, 1, 2, 3]), ("2,0", [2, 0]), ("3", [3]), ("", []), ("-1", []), ("1,9,0", [1]), ("1,1", []),
     (" 1 , 2 ", [1, 2]), ("GPU-2aaa", ["GPU-2aaa"])],
)  # fmt: skip
def test_visible_devices_are_read_as_cuda_reads_them(entries: str | None, expected: list[int | str]) -> None:
    assert nvml.visible(entries, 4) == expected


@pytest.mark.parametrize(
    ("visible", "devices", "indices"),
    [
        ("3,1", 2, [3, 1]),
        ("2", 1, [2]),
        ("GPU-2aaaaaaa-0000-0000-0000-000000000002,GPU-0aa", 2, [2, 0]),
        ("1,0", 1, [1]),
    ],
)
def test_each_ordinal_is_the_gpu_that_cuda_gives_it(run: Run, visible: str, devices: int, indices: list[int]) -> None:
    found = run(0.1, devices=devices, visible=visible, gpus=4)
    assert [one["index"] for one in found[0]["gpus"]] == indices
    assert [row[0] for row in kinds(found, "sample")[0]["gpus"]] == [(index + 1) * GIB for index in indices]


def test_fewer_gpus_than_asked_for_is_said(run: Run) -> None:
    assert "sees 1 of 2 GPUs (CUDA_VISIBLE_DEVICES=1)" in notes(run(0.1, visible="1"))


def test_unlike_gpus_in_cudas_own_order_are_doubted(run: Run) -> None:
    assert "may be of another GPU" in notes(run(0.1, names=["NVIDIA H200", "NVIDIA L4"]))


def test_calls_that_are_not_supported_leave_gaps_and_nothing_else(run: Run) -> None:
    refused = ["nvmlDeviceGetFieldValues", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetUtilizationRates",
               "nvmlDeviceGetPcieThroughput", "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetNvLinkState",
               "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetPciInfo", "nvmlDeviceGetTemperature"]  # fmt: skip
    found = run(0.5, refuse=refused)
    row = dict(zip(nvml.FAST, kinds(found, "sample")[0]["gpus"][1], strict=True))
    assert row == {"memory_used_bytes": 2 * GIB, "power_w": 180.0, "sm_clock_mhz": 1980, "memory_clock_mhz": 3201,
                   "utilisation": None, "energy_mj": None}  # fmt: skip
    assert found[0]["gpus"][0]["power_source"] == "average"
    assert found[0]["gpus"][0]["nvlinks"] == {}
    assert next(line["slow"]["0"] for line in found if "0" in line.get("slow", {})) == [None] * 4 + [[]]


def test_everything_refused_is_still_a_sample(run: Run) -> None:
    names = [name for name in dir(__import__("pynvml")) if name.startswith("nvmlDeviceGet") and "Handle" not in name]
    found = run(0.3, refuse=names)
    assert kinds(found, "sample")[-1]["gpus"] == [[None] * len(nvml.FAST)] * 2


def test_a_gpu_that_vanishes_is_named_and_the_others_go_on(run: Run) -> None:
    found = run(0.8, lost_after_s={"1": 0.4})
    assert "GPU 1 (GPU-1aaaaaaa-0000-0000-0000-000000000001) is lost: NVML error 15." in notes(found)
    last = kinds(found, "sample")[-1]["gpus"]
    assert last[0][0] == GIB
    assert last[1] is None


def test_the_sampler_ends_when_no_gpu_is_left(run: Run) -> None:
    found = run(0.6, lost_after_s={"0": 0.3, "1": 0.3})
    assert notes(found).count("is lost") == 2
    assert found[-1]["kind"] == "cost"


def test_throttling_is_named_once_by_gpu_and_reason(run: Run) -> None:
    text = notes(run(0.8, throttle_bits=0x1 | 0x40))
    assert text.count("throttles: hardware thermal slowdown") == 2
    assert "GPU 0 (GPU-0aaaaaaa-0000-0000-0000-000000000000) throttles" in text


def test_an_idle_gpu_does_not_throttle(run: Run) -> None:
    assert "throttles" not in notes(run(0.5, throttle_bits=0x1))


def test_own_processes_are_told_from_others(run: Run) -> None:
    own, other = os.getpid(), 1
    found = run(0.5, devices=1, processes=[[own, GIB], [other, 5 * GIB], [2**22 + 1, GIB]])
    assert {line["pid"]: line["own"] for line in kinds(found, "process")} == {own: True, other: False, 2**22 + 1: None}
    assert "process 1 (" in notes(found)
    assert "holds 5.0 GiB" in notes(found)
    assert f"process {own}" not in notes(found)


def test_no_driver_is_a_note_and_no_more(run: Run) -> None:
    found = run(0.1, no_driver=True)
    assert [line["kind"] for line in found] == ["note"]
    assert found[0]["text"] == "No GPU telemetry: NVMLError: NVML error 9"


def test_where_asking_is_dear_it_asks_less_often(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(5.3, devices=1, gpus=1, slow_call_s=0.01)
    assert "Ten samples a second took" in notes(found)
    assert kinds(found, "cost")[-1]["interval_s"] > 2 * sampler.INTERVAL_S
    assert kinds(found, "cost")[-1]["ms"]["UtilizationRates"] == pytest.approx(10.0, rel=0.2)


def test_it_takes_less_than_a_hundredth_of_a_core(run: Run) -> None:
    """With GPUs that answer at once: what the sampler itself takes. On a driver the record's own figure says it."""
    cost = kinds(run(2.0, devices=1, gpus=1), "cost")[-1]
    assert cost["cpu_s"] / cost["wall_s"] < 0.01


def test_switched_off_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sampler.SWITCH, "off")
    assert sampler.start(1, 0, os.getpid()) is None
    sampler.stop(None)


PARENT = "import os, time; from harness.payload import sampler; p = sampler.start(1, 0, os.getpid()); print(p.pid, flush=True); time.sleep(60)"  # noqa: E501


def test_it_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(FAKE), str(ROOT))), "FAKE_NVML": "{}"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    with parent.stdout:
        pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and state(pid) != "Z" and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists() or state(pid) == "Z"


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_device_sits_where_the_kernel_says(tmp_path: Path) -> None:
    device = tmp_path / "0000:c8:00.0"
    device.mkdir()
    (device / "numa_node").write_text("1\n")
    (device / "local_cpulist").write_text("32-63\n")
    assert nvml.host_place("0000:c8:00.0", tmp_path) == {"numa_node": 1, "near_cpus": "32-63"}
    (device / "numa_node").write_text("-1\n")
    assert nvml.host_place("0000:c8:00.0", tmp_path)["numa_node"] is None
    assert nvml.host_place(None, tmp_path) == {"numa_node": None, "near_cpus": None}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on PATH: apt-get install gcc")
def test_the_real_pynvml_is_called_as_its_header_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real bindings over a C library with NVML's signatures and two GPUs, the second one asked for first."""
    import pynvml

    library, source = tmp_path / "libnvidia-ml.so.1", ROOT / "tests/fakes/nvml.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(Path(pynvml.__file__).parent), str(ROOT))))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,0")
    sidecar = sampler.start(2, 0, os.getpid())
    assert sidecar
    wait_for_samples(tmp_path, sidecar)
    sampler.stop(sidecar)
    found = lines(tmp_path)
    assert kinds(found, "sample")[0]["gpus"] == [[used, 654.321, 1001, 1002, 0.55, 123456789012] for used in (71, 70)]
    assert kinds(found, "sample")[0]["slow"] == {"0": [44, 0x40, 7 * 1024, 9 * 1024, [[1, 12345]]]}
    assert "GPU 1 (GPU-1b) throttles: hardware thermal slowdown." in notes(found)
    (one,) = telemetry.read("train", [tmp_path], None).gpus[:1]
    assert (one.index, one.uuid, one.bus, one.total_bytes) == (1, "GPU-1b", "0000:d8:00.0", 1000)
    assert (one.pcie, one.power_limit_w, one.power_source) == ("gen 4 x8 of gen 5 x16", 700.0, "instant")
    assert (one.nvlinks, one.near) == ({"gpu 1": 1, "switch": 3}, {"1": "across NUMA nodes"})


@pytest.mark.parametrize("name", sorted({*nvml._REFUSALS, *nvml._LOSSES}))
def test_every_error_code_named_is_one_of_nvmls(name: str) -> None:
    import pynvml

    assert isinstance(getattr(pynvml, name), int)


def test_the_fake_has_the_real_ones_names_and_values() -> None:
    """Every call and constant that the fake answers exists in the real `pynvml`, constants with the same value."""
    import pynvml

    namespace: dict[str, Any] = {"__name__": __name__}
    exec(compile((FAKE / "pynvml.py").read_text(), "fake", "exec"), namespace)
    for name in namespace["_CALLS"]:
        assert callable(getattr(pynvml, name)), name
    constants = {name: value for name, value in namespace.items() if name.startswith(("NVML_", "nvmlMemory"))}
    assert {name: getattr(pynvml, name) for name in constants} == constants
    assert pynvml.NVML_FI_DEV_POWER_INSTANT == nvml.POWER_INSTANT
    assert pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION == nvml.ENERGY_TOTAL
    assert pynvml.NVML_NVLINK_MAX_LINKS == nvml.LINKS
    union = dict(pynvml.c_nvmlFieldValue_t._fields_)["value"]
    assert tuple(name for name, _ in union._fields_) == nvml._VALUE_OF_TYPE
