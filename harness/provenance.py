"""Where a run's numbers come from: environments, host, GPUs, commit, weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import harness
from harness import boxes, catalog, evidence, host, hub, schema, store
from harness.errors import HarnessError
from harness.schema import Environment, Plan, Provenance

PACKAGE = Path(harness.__file__).parent


def environments(plan: Plan, box: boxes.Box, recorded: store.Run | None) -> tuple[Environment, ...]:
    """The environments that the plan's jobs run in; a replay needs none and names those of the recording."""
    if recorded:
        return recorded.info().environments
    wanted = {(name, case.device) for case in plan.cases for name in evidence.NEEDS[case.kind]}
    # What a server's ranks fail to say to each other is probed with the libraries that train.
    wanted |= {("train", case.device) for case in plan.cases if case.kind == "serve" and _may_be_probed(plan, case)}
    names: tuple[schema.EnvironmentName, ...] = ("train", "serve")
    users = {name: sorted(device for user, device in wanted if user == name) for name in names}
    return tuple(_environment(plan, box, name, devices) for name, devices in users.items() if devices)


def _may_be_probed(plan: Plan, case: schema.AnyCase) -> bool:
    asked = plan.ladders.get(schema.case_id(case)) if plan.ladders else None
    return asked is not None and "nccl" in asked.ladders and case.devices > 1


def _environment(
    plan: Plan, box: boxes.Box, name: schema.EnvironmentName, devices: Sequence[schema.DeviceType]
) -> Environment:
    """The one environment for all jobs of a kind; HarnessError where the box has another for each device."""
    found = [box.environment(name, device) for device in devices]
    if len({environment.digest for environment in found}) > 1:
        raise HarnessError(
            f"{plan.source} has cases on a CPU and on GPUs, for which the box {box.name} has two {name} images",
            "a run directory holds numbers of one: put them into two matrices",
        )
    return found[0]


def recorded_gpus(recorded: store.Run) -> tuple[schema.Gpu, ...]:
    """The GPUs that a recorded run had."""
    found = {gpu.index: gpu for record in recorded.records() if record.provenance for gpu in record.provenance.gpus}
    return tuple(found.values())


def of_host(plan: Plan, directory: store.Run, backend: str, environments: tuple[Environment, ...]) -> Provenance:
    """What the records of this call share; also lays the payload's code into the run."""
    gpus, driver = host.gpus()
    return Provenance(
        number_kind="replayed" if backend == "replay" else "measured",
        harness_version=harness.__version__,
        commit=host.commit(PACKAGE.parent),
        payload_sha256=directory.stage_payload(PACKAGE),
        matrix_sha256=plan.matrix_sha256,
        backend=backend,
        environments=environments,
        hosts=(os.uname().nodename,),
        cpu=host.cpu_name(),
        cpu_count=host.cpu_count(),
        memory_bytes=host.memory_bytes(),
        gpus=gpus,
        driver=driver,
        weights="random",
    )


def weights(case: schema.AnyCase) -> str:
    """What the case's weights are: random, of a folder, or of the hub with the commit."""
    if isinstance(case, schema.ProbeCase):
        return "no"
    asked = case.train.weights if isinstance(case, schema.ChainCase) else case.weights
    if asked != "hub":
        return "random" if asked == "random" else "path"
    variant = catalog.variant(case.variant)
    commit = hub.commit_of(str(variant.checkpoint), variant.revision)
    return f"hub@{commit}" if commit else "hub"
