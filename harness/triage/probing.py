"""The rungs of the communication ladder: a case whose ranks failed to talk -> a rerun that buys evidence.

Each maker has the name of its entry in `ladders/nccl.yaml`, which says in what order and at what cost. Most make a
probe: it has no model and takes a minute, and what it can do without the case's own code tells whose fault it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.schema import AnyCase, Diagnosis, ProbeCase, Rung, TrainCase
from harness.triage.rungs import Maker, Means, Part

CHECKPOINT_PHASES = frozenset({"save", "eval", "reload", "merge"})
"""In which a slow disk looks like a slow network."""
OF_THE_DISK = frozenset({"storage_full"})
"""Failures that a local disk brings of its own."""
_ITSELF = "Look at what the case's own ranks did before it: the rank that stops first, its data, its memory."
_ALONE = "one rank has nobody to talk to"
_WORKS = "the ranks reduce together as they are ({})"


def nccl_debug(case: Part, means: Means) -> ProbeCase | str:
    """The same ranks without the model, everything said."""
    return _probe(case) if case.devices > 1 else _ALONE


def interface(case: Part, means: Means) -> ProbeCase | str:
    """The sockets pinned to one interface: on one host its loopback, else one that reaches other hosts."""
    if case.devices < 2:
        return _ALONE
    if works := _worked(means):
        return works
    asked = case.interface if isinstance(case, ProbeCase) else None
    choices = ("lo", *means.interfaces) if case.nodes == 1 else means.interfaces
    found = next((name for name in choices if name != asked), None)
    return _probe(case, interface=found) if found else "this host shows no other interface that is up"


def two_ranks(case: Part, means: Means) -> ProbeCase | str:
    """The smallest group that can fail."""
    if case.devices < 2:
        return _ALONE
    if works := _worked(means):
        return works
    return _probe(case, devices=2, nodes=1) if case.devices > 2 else "it has two ranks already"


def p2p_off(case: Part, means: Means) -> ProbeCase | str:
    """GPUs talk through the host's memory."""
    if case.device == "cpu":
        return "only GPUs copy to each other directly"
    if case.devices < 2:
        return _ALONE
    if works := _worked(means):
        return works
    few = {"devices": 2, "nodes": 1} if "two_ranks" in means.ran else {}
    return _probe(case, p2p=False, **few)


def local_checkpoints(case: Part, means: Means) -> TrainCase | str:
    """The case once more, its checkpoints on a local disk."""
    phase = means.diagnosis.phase if means.diagnosis else None
    if not isinstance(case, TrainCase) or phase not in CHECKPOINT_PHASES:
        return f"it failed in phase {phase or 'unknown'}, and not while a checkpoint was written"
    if case.checkpoints == "local":
        return "its checkpoints lay on a local disk already"
    if "local_checkpoints" in means.ran:
        return "it was tried already"
    if means.ran and not means.ran.get("nccl_debug"):
        return "the ranks do not talk as they are even where nothing is written"
    return case.model_copy(update={"checkpoints": "local"})


RUNGS: Mapping[str, Maker] = {
    made.__name__: made for made in (nccl_debug, interface, two_ranks, p2p_off, local_checkpoints)
}


def _probe(case: Part, **changes: object) -> ProbeCase:
    """A probe of the case's ranks with debug on; one that is a probe already keeps what it pins."""
    if isinstance(case, ProbeCase):
        return case.model_copy(update={"debug": True, **changes})
    fields = {"device": case.device, "devices": case.devices, "nodes": case.nodes, "debug": True}
    return ProbeCase.model_validate(fields | changes)


def _worked(means: Means) -> str | None:
    """Why a rung that narrows the fault down is not needed: a probe before it ran as asked."""
    rung = next((name for name, ran in means.ran.items() if ran and name != "local_checkpoints"), None)
    return _WORKS.format(rung) if rung else None


# ---------------------------------------------------------------- what the probes showed


@dataclass(frozen=True)
class Probed:
    """A rung that was climbed, and how its case ended."""

    rung: Rung
    case: AnyCase
    diagnosis: Diagnosis | None
    """`None` where it ran as asked."""


def with_evidence(diagnosis: Diagnosis, probes: Sequence[Probed]) -> Diagnosis:
    """The diagnosis of the case that failed, with what the probes showed and the next step that follows from it."""
    if not probes:
        return diagnosis
    showed, next_step = _conclusion(probes, diagnosis.phase)
    return diagnosis.model_copy(update={"showed": showed, "next_step": next_step})


def _conclusion(probes: Sequence[Probed], phase: str | None) -> tuple[str, str]:
    """One sentence, and what to do; `phase` is that in which the case failed."""
    if probes[-1].rung.name == "local_checkpoints":
        return _of_storage(probes[-1], probes[:-1])
    last = next((one for one in probes if one.diagnosis is None), probes[-1])
    ranks = f"{last.case.devices} ranks"
    if last.diagnosis is not None:
        return (f"The probe fails too, without any model ({', '.join(_failed(one) for one in probes)}): not the model.",
                _look_at(last))  # fmt: skip
    return {
        "nccl_debug": (
            f"Without the model the all-reduce of {ranks} completes: the communication works, at least for a minute.",
            "Write checkpoints to a local disk: give --runs a folder there." if phase in CHECKPOINT_PHASES else _ITSELF,
        ),
        "interface": (
            f"With the interface pinned to {_interface(last.case)} the all-reduce of {ranks} completes: "
            "the choice of interface is the cause.",
            f"Set {_variable(last.case)}={_interface(last.case)} for the job.",
        ),
        "two_ranks": (
            f"Two ranks reduce together, {_more(probes)} do not: the fault lies beyond the first pair.",
            "Probe further pairs, each with two of the devices; the pair that fails names the device or its link.",
        ),
        "p2p_off": (
            f"With P2P off the all-reduce of {ranks} completes: the P2P path is suspect.",
            "Run with NCCL_P2P_DISABLE=1 meanwhile; look at `nvidia-smi topo -m`, and whether IOMMU or ACS is on.",
        ),
    }[last.rung.name]


def _of_storage(rerun: Probed, probes: Sequence[Probed]) -> tuple[str, str]:
    """What the case showed with its checkpoints on a local disk, after probes that worked, if any."""
    talk = f"Without the model the all-reduce of {probes[-1].case.devices} ranks completes. " if probes else ""
    if rerun.diagnosis is None:
        return (f"{talk}With checkpoints on a local disk the case completes: the storage path is suspect.",
                "Write checkpoints to a local disk (`checkpoints: local`), and look at the file system of the run "
                "directory: its server, its mount options, its quota.")  # fmt: skip
    failure, phase = rerun.diagnosis.failure_class, rerun.diagnosis.phase
    if phase in CHECKPOINT_PHASES and failure not in OF_THE_DISK:
        return f"{talk}With checkpoints on a local disk it fails too ({failure} in {phase}): not the storage.", _ITSELF
    where = f"{failure} in {phase}" if phase else failure
    return (f"{talk}With checkpoints on a local disk it failed otherwise ({where}), which says nothing of the storage.",
            rerun.diagnosis.next_step)  # fmt: skip


def _failed(one: Probed) -> str:
    failure = one.diagnosis.failure_class if one.diagnosis else ""
    return f"{one.rung.name}: {failure}"


def _more(probes: Sequence[Probed]) -> int:
    return max(one.case.devices for one in probes)


def _variable(case: AnyCase) -> str:
    return "GLOO_SOCKET_IFNAME" if case.device == "cpu" else "NCCL_SOCKET_IFNAME"


def _interface(case: AnyCase) -> str | None:
    return case.interface if isinstance(case, ProbeCase) else None


def _look_at(last: Probed) -> str:
    """The next step that the smallest probe that failed names."""
    step = last.diagnosis.next_step if last.diagnosis else ""
    return f"Mend the communication first, with the probe alone: {step}" if step else "Mend the communication first."
