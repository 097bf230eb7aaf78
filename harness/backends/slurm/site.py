"""A site: what a person knows of a Slurm cluster, read from YAML and refused where a word of it is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from harness.catalog import nearest
from harness.errors import HarnessError
from harness.schema import EnvironmentName, Frozen

Runtime = Literal["pyxis", "apptainer", "venv", "found"]
GpuRequest = Literal["none", "gres", "gpus-per-node"]
Word = Annotated[str, Field(min_length=1, pattern=r"^[^\s'\"`;$\\]+$")]
"""What goes into a directive as it is: no space, no quote, nothing that a shell would read."""
Absolute = Annotated[str, Field(pattern=r"^/[^'\"`;$\\\n]*$")]
NETWORK_PREFIXES = ("NCCL_", "GLOO_", "UCX_", "FI_", "NVSHMEM_", "TORCH_NCCL_", "OMPI_", "MLX5_")
SITES = "harness/sites"


class Site(Frozen):
    """A cluster as its file describes it; every key has a unit in its name or none."""

    model_config = ConfigDict(strict=True)

    version: Literal[1]
    runs: Absolute
    """Folder for run directories that the login node and every node see under this same path."""
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Annotated[str, Field(pattern=r"^[^\s'\"`;$\\]+$")] | None = None
    reservation: Word | None = None
    nodes: int = Field(1, ge=1)
    """Most nodes that one job may have."""
    gpus_per_node: int = Field(0, ge=0)
    gpu_request: GpuRequest = "none"
    gpu_type: Word | None = None
    cpus_per_device: int | None = Field(None, ge=1)
    """Processors for each rank; `None` leaves it to the site."""
    cpus_per_node: int | None = Field(None, ge=1)
    """Ranks on a CPU that one node takes; `None`: as many as are asked."""
    memory_per_node: Annotated[str, Field(pattern=r"^\d+[KMGT]?$")] | None = None
    exclusive: bool = False
    max_time_limit_s: float | None = Field(None, gt=0)
    runtime: Runtime = "venv"
    images: dict[EnvironmentName, Annotated[str, Field(pattern=r"^[^\s'\"`;$\\]+$")]] = Field(default_factory=dict)
    """By environment: for pyxis a registry's image by digest or a squashfs file, for apptainer a SIF."""
    mounts: tuple[Absolute, ...] = ()
    """Host paths that containers see besides the run directory."""
    scratch: Annotated[str, Field(pattern=r"^[/$][^'\"`;\\\n]*$")] | None = None
    """Node-local folder; may name a variable that a job has there, such as $SLURM_TMPDIR."""
    copy_back: Literal["needed", "all"] = "needed"
    """Which artifacts come back from scratch: those that a later job of the case reads, or all."""
    environment: tuple[str, ...] = ()
    """Lines of shell for the start of every script, such as `module load cuda`."""
    network: dict[str, str] = Field(default_factory=dict)
    """NCCL's and its transports' variables; they win over the harness's own."""
    head_address: Literal["hostname", "ip"] = "hostname"
    """How other nodes reach the first one: by its name, or by its first address."""
    max_queued: int = Field(16, ge=1)
    """Most jobs of one run in the queue at a time, at work or waiting."""
    exclude_nodes: tuple[Word, ...] = ()
    accounting: bool = True
    """Whether sacct answers here."""
    poll_s: float = Field(5.0, gt=0)
    """Least time between two looks at the queue."""
    notice_s: int = Field(60, ge=5)
    """How long before the end of its time a job is told, to save what is there."""
    lost_after_s: float = Field(120.0, ge=0)
    """How long a job may be unknown to the queue and to accounting before it counts as lost."""

    @model_validator(mode="after")
    def _agrees(self) -> Site:
        if self.runtime in ("pyxis", "apptainer") and not self.images:
            raise ValueError(f"runtime: {self.runtime} needs an image for each environment, under images")
        if self.runtime not in ("pyxis", "apptainer") and self.images:
            raise ValueError(f"images: runtime {self.runtime} uses no image")
        if self.gpus_per_node and self.gpu_request == "none":
            raise ValueError("gpus_per_node: say how the GPUs are requested, by gpu_request: gres or gpus-per-node")
        for name in self.network:
            if not name.startswith(NETWORK_PREFIXES):
                raise ValueError(f"network: {name} is no variable of the network between ranks; use environment")
        return self


def folder() -> Path:
    """The user's folder of site files: `$XDG_CONFIG_HOME/harness/sites`."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / SITES


def path_of(name: str) -> Path:
    """The site file that a person means by `name`: a path, or the name of one in their folder."""
    if not name:
        raise HarnessError("the slurm backend needs a site", "say `--backend slurm --site NAME` or `--site FILE.yaml`")
    by_path = "/" in name or name.endswith((".yaml", ".yml"))
    path = Path(name) if by_path else folder() / f"{name}.yaml"
    if path.is_file():
        return path.resolve()
    known = sorted(one.stem for one in folder().glob("*.yaml"))
    hint = f"known sites: {', '.join(known)}" if known else f"write one into {folder()}, or give a file's path"
    raise HarnessError(f"{path}: no such site file{nearest(name, known)}", hint)


def load(name: str) -> Site:
    """The site called `name`, or at that path; HarnessError with file, line and key for the first mistake."""
    path = path_of(name)
    try:
        content = YAML().load(path.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise HarnessError(f"{path}:{line}: {error.problem}", "mend the YAML there") from None
    if not isinstance(content, dict):
        raise HarnessError(f"{path}:1: a site file is a mapping of keys", "begin it with `version: 1`")
    try:
        return Site.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise _complaint(path, content, error) from None


def _complaint(path: Path, content: Any, error: ValidationError) -> HarnessError:
    """One mistake with its place, for a person."""
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else str(first["msg"]).split(":")[0].removeprefix("Value error, ")
    line = content.lc.key(key)[0] + 1 if key in content else 1
    if first["type"] == "extra_forbidden":
        known = list(Site.model_fields)
        message = f"a site has no key {key!r}{nearest(key, known)}"
        return HarnessError(f"{path}:{line}: {message}", f"keys: {', '.join(known)}")
    if first["type"] == "missing":
        return HarnessError(f"{path}: the key {key!r} is missing", "see the examples beside the slurm backend")
    said = str(first["msg"]).removeprefix("Value error, ").removeprefix(f"{key}: ")
    return HarnessError(f"{path}:{line}: {key}: {said}", "the commented examples show each key")
