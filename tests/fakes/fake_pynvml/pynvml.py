"""A `pynvml` with invented GPUs, for the real sampler process: put this folder on PYTHONPATH.

The environment variable FAKE_NVML holds JSON: gpus (how many), refuse [names of calls that are not supported],
lost_after_s {index: seconds}, throttle_bits, processes [[pid, bytes]], names [of each GPU], slow_call_s.
Constants are NVML's own (nvml.h). GPU i holds i + 1 GiB, draws 100 * (i + 1) W and its energy counter follows.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
NVML_PCIE_UTIL_TX_BYTES, NVML_PCIE_UTIL_RX_BYTES = 0, 1
NVML_ERROR_INVALID_ARGUMENT, NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION = 2, 3, 4
NVML_ERROR_NOT_FOUND, NVML_ERROR_FUNCTION_NOT_FOUND, NVML_ERROR_GPU_IS_LOST = 6, 13, 15
nvmlMemory_v2 = 0x02000028

PLAN: dict[str, Any] = {"gpus": 2, "refuse": [], "lost_after_s": {}, "throttle_bits": 1, "processes": [], "names": [],
                        "slow_call_s": 0.0} | json.loads(os.environ.get("FAKE_NVML", "{}"))  # fmt: skip
BEGAN = time.monotonic()
GIB = 2**30


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


def nvmlInit() -> None:
    if PLAN.get("no_driver"):
        raise NVMLError(9)


def nvmlShutdown() -> None:
    """Nothing to let go of."""


def nvmlSystemGetDriverVersion() -> str:
    return "580.0"


def nvmlDeviceGetCount() -> int:
    return int(PLAN["gpus"])


class Handle:
    """As a ctypes pointer: nothing to hash or compare."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, index: int) -> None:
        self.number = index


def nvmlDeviceGetHandleByIndex(index: int) -> Handle:
    if index >= PLAN["gpus"]:
        raise NVMLError(NVML_ERROR_INVALID_ARGUMENT)
    return Handle(index)


def nvmlDeviceGetHandleByUUID(uuid: str) -> Handle:
    for index in range(PLAN["gpus"]):
        if uuid == _uuid(index):
            return Handle(index)
    raise NVMLError(NVML_ERROR_NOT_FOUND)


def _uuid(index: int) -> str:
    return f"GPU-{index}aaaaaaa-0000-0000-0000-00000000000{index}"


def _energy_mj(handle: int) -> int:
    return int(1e9 + 100_000 * (handle + 1) * (time.monotonic() - BEGAN))


def _fields(handle: int, ids: tuple[int, ...]) -> list[SimpleNamespace]:
    power = SimpleNamespace(nvmlReturn=0, valueType=1, value=SimpleNamespace(uiVal=100_000 * (handle + 1)))
    energy = SimpleNamespace(nvmlReturn=0, valueType=3, value=SimpleNamespace(ullVal=_energy_mj(handle)))
    return [{186: power, 83: energy}[number] for number in ids]


def _link(handle: int, link: int) -> int:
    if link >= 18:
        raise NVMLError(NVML_ERROR_INVALID_ARGUMENT)
    return int(link < 4)


_BUS = [f"00000000:{index:02X}:00.0" for index in range(16)]
_CALLS = {
    "nvmlDeviceGetIndex": lambda handle: handle,
    "nvmlDeviceGetUUID": _uuid,
    "nvmlDeviceGetName": lambda handle: (PLAN["names"] or ["NVIDIA H200"] * 16)[handle],
    "nvmlDeviceGetMemoryInfo": lambda handle, version=None: SimpleNamespace(total=141 * GIB, used=(handle + 1) * GIB),
    "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=50 + handle, memory=10),
    "nvmlDeviceGetClockInfo": lambda handle, kind: 1980 if kind == NVML_CLOCK_SM else 3201,
    "nvmlDeviceGetPowerUsage": lambda handle: 90_000 * (handle + 1),
    "nvmlDeviceGetTotalEnergyConsumption": _energy_mj,
    "nvmlDeviceGetFieldValues": _fields,
    "nvmlDeviceGetTemperature": lambda handle, sensor: 40 + handle,
    "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: PLAN["throttle_bits"],
    "nvmlDeviceGetPcieThroughput": lambda handle, counter: 1000 + counter,
    "nvmlDeviceGetComputeRunningProcesses": lambda handle: [
        SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in PLAN["processes"]
    ],
    "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
    "nvmlDeviceGetPciInfo": lambda handle: SimpleNamespace(busId=_BUS[handle]),
    "nvmlDeviceGetCurrPcieLinkGeneration": lambda handle: 5,
    "nvmlDeviceGetMaxPcieLinkGeneration": lambda handle: 5,
    "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 16,
    "nvmlDeviceGetMaxPcieLinkWidth": lambda handle: 16,
    "nvmlDeviceGetNvLinkState": _link,
    "nvmlDeviceGetNvLinkRemoteDeviceType": lambda handle, link: 2 if link else 0,
    "nvmlDeviceGetNvLinkRemotePciInfo": lambda handle, link: SimpleNamespace(
        busId="00000000:FF:00.0" if link else _BUS[1 - handle]
    ),
    "nvmlDeviceGetTopologyCommonAncestor": lambda handle, other: 50,
}


def _guarded(name: str) -> Any:
    def call(device: Handle, *arguments: Any) -> Any:
        handle = device.number
        if PLAN["slow_call_s"]:
            until = time.process_time() + PLAN["slow_call_s"]
            while time.process_time() < until:
                pass
        if name in PLAN["refuse"]:
            raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
        limit = PLAN["lost_after_s"].get(str(handle))
        if limit is not None and time.monotonic() - BEGAN > limit:
            raise NVMLError(NVML_ERROR_GPU_IS_LOST)
        return _CALLS[name](handle, *arguments)  # type: ignore[operator]

    return call


for _name in _CALLS:
    setattr(sys.modules[__name__], _name, _guarded(_name))
