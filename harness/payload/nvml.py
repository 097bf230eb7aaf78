"""What NVML says of one job's GPUs, where any call may be unsupported and any GPU may vanish. Needs `pynvml`."""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

FAST = ("memory_used_bytes", "power_w", "sm_clock_mhz", "memory_clock_mhz", "utilisation", "energy_mj")
"""Columns of a sample; `utilisation` is NVML's share of time with a kernel running, 0 to 1."""
TICKS = {"memory": 1, "power": 1, "sm_clock": 2, "utilisation": 2, "memory_clock": 10}
"""Ticks between two times that a question is asked. A call takes 0.5 to 1 ms of a core where the driver asks the GPU's
own processor and spins (seen, H200, driver 580); NVML averages utilisation over 1/6 s or more (nvml.h)."""
SLOW = ("temperature_c", "throttle_bits", "pcie_rx_bytes_per_s", "pcie_tx_bytes_per_s", "processes")
"""Asked once a second; processes are [pid, bytes] pairs."""

POWER_INSTANT, ENERGY_TOTAL = 186, 83
"""NVML_FI_DEV_POWER_INSTANT, in mW, and NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, in mJ (nvml.h).

`nvmlDeviceGetPowerUsage` is an average over a second from Ampere on (nvml.h), so it stands in only where these fail.
"""
_VALUE_OF_TYPE = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
"""By `nvmlValueType_t`, the member of the union that holds the value."""
_KIB = 1024
"""`nvmlDeviceGetPcieThroughput` states KB/s; the tools that show it count 1,024."""

LINKS = 36
PEER_KINDS = {0: "gpu", 1: "cpu", 2: "switch"}
ANCESTORS = {0: "one board", 10: "one PCIe switch", 20: "several PCIe switches", 30: "one host bridge",
             40: "one NUMA node", 50: "across NUMA nodes"}  # fmt: skip
"""`nvmlGpuTopologyLevel_t`."""

_REFUSALS = ("NVML_ERROR_NOT_SUPPORTED", "NVML_ERROR_FUNCTION_NOT_FOUND", "NVML_ERROR_NO_PERMISSION",
             "NVML_ERROR_ARGUMENT_VERSION_MISMATCH", "NVML_ERROR_DEPRECATED",
             "NVML_ERROR_INVALID_ARGUMENT")  # fmt: skip
_LOSSES = ("NVML_ERROR_GPU_IS_LOST", "NVML_ERROR_RESET_REQUIRED", "NVML_ERROR_GPU_NOT_FOUND",
           "NVML_ERROR_DRIVER_NOT_LOADED", "NVML_ERROR_UNINITIALIZED")  # fmt: skip


class Lost(Exception):
    """The GPU no longer answers."""


class Card:
    """One GPU, and which questions it has refused for good."""

    def __init__(self, nvml: Any, handle: Any, ordinal: int) -> None:
        self._nvml, self._handle, self.ordinal = nvml, handle, ordinal
        self._refused: set[tuple[Any, ...]] = set()
        self.cpu_s: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self._never = {getattr(nvml, name, None) for name in _REFUSALS}
        self._lost = {getattr(nvml, name, None) for name in _LOSSES}
        self._mismatch = getattr(nvml, "NVMLLibraryMismatchError", ())
        self.index = self.ask("nvmlDeviceGetIndex")
        self.uuid = _text(self.ask("nvmlDeviceGetUUID"))
        self._memory_version = getattr(nvml, "nvmlMemory_v2", None)
        self.power_source = "instant" if self._fields()[0] else "average"

    def ask(self, name: str, *arguments: Any) -> Any:
        """The answer of one NVML call, None where there is none; a call that is not supported is made once."""
        question = (name, *(argument for argument in arguments if isinstance(argument, int | tuple)))  # not a handle
        if question in self._refused:
            return None
        call, began = getattr(self._nvml, name, None), time.thread_time()
        try:
            return call(self._handle, *arguments) if call else self._refuse(question)
        except self._mismatch:
            return self._refuse(question)
        except self._nvml.NVMLError as error:
            if error.value in self._lost:
                raise Lost(str(error)) from None
            return self._refuse(question) if error.value in self._never else None
        finally:
            self.cpu_s[name] += time.thread_time() - began
            self.calls[name] += 1

    def _refuse(self, question: tuple[Any, ...]) -> None:
        self._refused.add(question)

    def name(self) -> str:
        """How a person finds it: its index and UUID."""
        return f"GPU {self.index if self.index is not None else self.ordinal} ({self.uuid})"

    # ------------------------------------------------------------ at each tick

    def fast(self, questions: Collection[str]) -> list[Any]:
        """One value for each name of `FAST`, None where it is not among the questions (`TICKS`)."""
        memory = self.memory() if "memory" in questions else None
        power_w, energy_mj = self._power_and_energy() if "power" in questions else (None, None)
        rates = self.ask("nvmlDeviceGetUtilizationRates") if "utilisation" in questions else None
        return [
            int(memory.used) if memory else None,
            power_w,
            self.ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM) if "sm_clock" in questions else None,
            self.ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM) if "memory_clock" in questions else None,
            rates.gpu / 100 if rates else None,
            energy_mj,
        ]

    def memory(self) -> Any:
        """Total and used; in NVML's second version, where it has one, the driver's reserve is not `used`."""
        second = self.ask("nvmlDeviceGetMemoryInfo", self._memory_version) if self._memory_version else None
        return second if second is not None else self.ask("nvmlDeviceGetMemoryInfo")

    def _power_and_energy(self) -> tuple[float | None, int | None]:
        power, energy = self._fields() if self.power_source == "instant" else (None, None)
        power = power if power is not None else self.ask("nvmlDeviceGetPowerUsage")
        energy = energy if energy is not None else self.ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if power is None else power / 1000, energy

    def _fields(self) -> tuple[Any, Any]:
        """Power in mW and energy in mJ by one call."""
        found = self.ask("nvmlDeviceGetFieldValues", (POWER_INSTANT, ENERGY_TOTAL))
        power, energy = [_field(one) for one in found] if found is not None else (None, None)
        return power, energy

    # ------------------------------------------------------------ once a second

    def slow(self) -> list[Any]:
        """One value for each name of `SLOW`; takes 40 ms, which NVML sleeps while it counts PCIe traffic."""
        received, sent = (self.ask("nvmlDeviceGetPcieThroughput", getattr(self._nvml, name))
                          for name in ("NVML_PCIE_UTIL_RX_BYTES", "NVML_PCIE_UTIL_TX_BYTES"))  # fmt: skip
        return [
            self.ask("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU),
            self._throttle_bits(),
            None if received is None else received * _KIB,
            None if sent is None else sent * _KIB,
            [[one.pid, one.usedGpuMemory] for one in self.ask("nvmlDeviceGetComputeRunningProcesses") or ()],
        ]

    def _throttle_bits(self) -> int | None:
        found = self.ask("nvmlDeviceGetCurrentClocksEventReasons")
        return found if found is not None else self.ask("nvmlDeviceGetCurrentClocksThrottleReasons")

    # ------------------------------------------------------------ once

    def describe(self, others: list[Card]) -> dict[str, Any]:
        """What does not change: names, sizes, links, and where it sits in the host."""
        memory, limit = self.memory(), self.ask("nvmlDeviceGetEnforcedPowerLimit")
        bus = self.bus()
        return {
            "ordinal": self.ordinal, "index": self.index, "uuid": self.uuid,
            "name": _text(self.ask("nvmlDeviceGetName")), "bus": bus,
            "total_bytes": int(memory.total) if memory else None,
            "power_limit_w": None if limit is None else limit / 1000, "power_source": self.power_source,
            "pcie_generation": self.ask("nvmlDeviceGetCurrPcieLinkGeneration"),
            "pcie_generation_max": self.ask("nvmlDeviceGetMaxPcieLinkGeneration"),
            "pcie_width": self.ask("nvmlDeviceGetCurrPcieLinkWidth"),
            "pcie_width_max": self.ask("nvmlDeviceGetMaxPcieLinkWidth"),
            "nvlinks": self._nvlinks({other.bus(): other for other in others}),
            "near": {str(other.ordinal): level for other in others if other is not self and
                     (level := ANCESTORS.get(self.ask("nvmlDeviceGetTopologyCommonAncestor", other._handle)))},
            **host_place(bus),
        }  # fmt: skip

    def bus(self) -> str | None:
        """The PCI address as the kernel writes it: `0000:c8:00.0`."""
        found = self.ask("nvmlDeviceGetPciInfo")
        return _kernel_bus(_text(found.busId)) if found else None

    def _nvlinks(self, known: dict[str | None, Card]) -> dict[str, int]:
        """Active NVLinks by what is at their other end: `switch`, `gpu <ordinal>` of this job, or another `gpu`."""
        found: dict[str, int] = {}
        for link in range(LINKS):
            if not self.ask("nvmlDeviceGetNvLinkState", link):
                continue
            kind = PEER_KINDS.get(self.ask("nvmlDeviceGetNvLinkRemoteDeviceType", link), "unknown")
            remote = self.ask("nvmlDeviceGetNvLinkRemotePciInfo", link)
            peer = known.get(_kernel_bus(_text(remote.busId))) if remote else None
            name = f"gpu {peer.ordinal}" if peer else kind
            found[name] = found.get(name, 0) + 1
        return found


def _field(of: Any) -> Any:
    """The value of one field, None where NVML refused it."""
    if of.nvmlReturn != 0 or not 0 <= of.valueType < len(_VALUE_OF_TYPE):
        return None
    return getattr(of.value, _VALUE_OF_TYPE[of.valueType])


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _kernel_bus(bus: str | None) -> str | None:
    """NVML's `00000000:C8:00.0` as the kernel writes it."""
    return bus[-12:].lower() if bus else None


def host_place(bus: str | None, devices: Path = Path("/sys/bus/pci/devices")) -> dict[str, Any]:
    """NUMA node and near CPUs of a PCI device, as the kernel says; it writes -1 where there is one node only."""
    said: dict[str, str | None] = {}
    for name, file in (("numa_node", "numa_node"), ("near_cpus", "local_cpulist")):
        said[name] = None
        with contextlib.suppress(OSError):
            said[name] = (devices / str(bus) / file).read_text(encoding="ascii", errors="replace").strip()
    node = said["numa_node"]
    return {"numa_node": int(node) if node and node.isdigit() else None, "near_cpus": said["near_cpus"]}


# ---------------------------------------------------------------- which GPUs are this job's


def visible(entries: str | None, count: int) -> list[int | str]:
    """What CUDA_VISIBLE_DEVICES leaves of `count` GPUs, as indices and UUIDs, in the order of CUDA's ordinals.

    As CUDA does: unset is all, the first entry that is no GPU ends the list, an entry given twice empties it.
    Source: CUDA C++ Programming Guide, "CUDA Environment Variables".
    """
    if entries is None:
        return list(range(count))
    found: list[int | str] = []
    for entry in (part.strip() for part in entries.split(",")):
        if entry.isdigit() and int(entry) < count:
            found.append(int(entry))
        elif entry.startswith(("GPU-", "MIG-")):
            found.append(entry)
        else:
            break
    return found if len(set(found)) == len(found) else []


def handle_of(nvml: Any, entry: int | str, count: int) -> Any:
    """NVML's handle of an index or a UUID, which may be any unique start of one; NVMLError where there is none."""
    if isinstance(entry, int):
        return nvml.nvmlDeviceGetHandleByIndex(entry)
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    starting = [handle for handle in handles if str(_text(nvml.nvmlDeviceGetUUID(handle))).startswith(entry)]
    return starting[0] if len(starting) == 1 else nvml.nvmlDeviceGetHandleByUUID(entry)


def cards(nvml: Any, devices: int) -> list[Card]:
    """The first `devices` GPUs that CUDA shows to this process, in the order of its ordinals."""
    count = nvml.nvmlDeviceGetCount()
    entries = visible(os.environ.get("CUDA_VISIBLE_DEVICES"), count)[:devices]
    return [Card(nvml, handle_of(nvml, entry, count), ordinal) for ordinal, entry in enumerate(entries)]


def order_doubt(nvml: Any) -> str | None:
    """A sentence where CUDA's numbers may not be NVML's: unlike GPUs that CUDA sorts by speed."""
    if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return None
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        named = {nvml.nvmlDeviceGetName(handle) for handle in handles}
    except nvml.NVMLError:
        return "Not every GPU of this host says its name: telemetry may be of another GPU than CUDA's."
    if len(named) < 2:
        return None
    return "The host's GPUs differ and CUDA_DEVICE_ORDER is not PCI_BUS_ID: telemetry may be of another GPU."
