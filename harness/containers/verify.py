"""`harness verify`: what is really in an image, held against the lock it was built from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from harness.containers import engine, imagelock, probe, requirements
from harness.containers.imagelock import ImageLock, Variant
from harness.containers.probe import Attempt, Contents
from harness.errors import HarnessError
from harness.installed import lock_differences, read_lock
from harness.schema import EnvironmentName, Frozen

if TYPE_CHECKING:
    from docker import DockerClient

State = Literal["ok", "wrong", "unchecked"]

NEEDS_GPU = (
    "libcuda.so.1",
    "libnvidia-encode.so.1",
    "NVIDIA driver",
    "No CUDA GPUs",
    "no NVIDIA GPU",
    "0 active drivers",
    "Failed to infer device",
)
"""Words of an error that a machine with a GPU would not give."""

DRIVER = ("Triton's module for the driver", "native", "triton:/opt/harness/triton/cuda_utils.so")
"""What `$CC` of a CUDA image answers with; it has to name libcuda.so.1, or no Triton kernel is ever launched."""

KERNELS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "train-cpu": (("bitsandbytes' CPU library", "native", "bitsandbytes:libbitsandbytes_cpu.so"),),
    "train-cuda": (
        # Its extension finds torch's libraries only once torch is loaded, as this does.
        ("mamba-ssm's Mamba-2 kernels", "imports", "mamba_ssm.ops.triton.ssd_combined"),
        ("mamba-ssm's CUDA extension", "imports", "selective_scan_cuda"),
        ("causal-conv1d's CUDA extension", "imports", "causal_conv1d_cuda"),
        ("bitsandbytes' CUDA library", "native", "bitsandbytes:libbitsandbytes_cuda{cuda}.so"),
        DRIVER,
    ),
    # Not its _C_AVX2 and _C_AVX512 too: each stands for the same operators, and two in one process crash.
    "serve-cpu": (("vLLM's compiled extension", "native", "vllm:_C.abi3.so"),),
    "serve-cuda": (
        ("vLLM's compiled extension", "native", "vllm:_C_stable_libtorch*.so"),
        ("vLLM's MoE kernels", "native", "vllm:_moe_C*.so"),
        ("vLLM's FlashAttention 3", "native", "vllm:vllm_flash_attn/_vllm_fa3_C*.so"),
        DRIVER,
    ),
}
"""What must be there beside Python code: what it is, how it is tried, and its import name or `package:file` (a file
outside the package by its whole path)."""

NEEDS_A_GPU = (
    "that a kernel runs on a GPU and gives the right values: a case's proof line says which ran",
    "that the host's driver is new enough: `harness doctor` on the GPU host says",
)


class Check(Frozen):
    """One thing that was looked at."""

    what: str
    state: State
    detail: str = ""


class Verdict(Frozen):
    """All that was found out about an image."""

    image: str
    name: str
    """`train-cpu` and so on."""
    python: str
    packages: int
    imported: int
    checks: tuple[Check, ...]
    without_gpu: tuple[str, ...]
    """What only a machine with a GPU can show."""

    @property
    def ok(self) -> bool:
        """Nothing that could be checked is wrong."""
        return not any(check.state == "wrong" for check in self.checks)


def verify(asked: str, root: Path, client: DockerClient | None = None) -> Verdict:
    """Look into the image `asked`: a name of images.lock such as train-cpu, an image id, NAME@sha256:... or a tag."""
    client = client or engine.connect()
    locked = imagelock.read(imagelock.path_of(root))
    image, facts = _find(asked, locked, client)
    name = _name(asked, facts)
    contents = probe.ask(client, image)
    imports = _imports(client, image, contents)
    kernels = _kernels(client, image, name, contents)
    checks = (
        *_against_images_lock(image, name, locked),
        *_against_requirements(name, root, facts, contents),
        *_make(facts, contents),
        *_judged_imports(imports),
        *kernels,
    )
    gpu = NEEDS_A_GPU if name.endswith("cuda") else ()
    return Verdict(
        image=image,
        name=name,
        python=contents.python,
        packages=len(contents.distributions),
        imported=sum(attempt.ok for attempt in imports),
        checks=checks,
        without_gpu=(*gpu, *(f"{check.what}: {check.detail}" for check in checks if check.state == "unchecked")),
    )


def _find(asked: str, locked: ImageLock, client: DockerClient) -> tuple[str, dict[str, Any]]:
    """The image's id and what the Engine knows of it."""
    reference = locked.images[asked].image if asked in locked.images else asked
    facts = engine.inspect(client, reference)
    if facts is None:
        known = ", ".join(locked.images) or "none"
        raise HarnessError(
            f"the Engine has no image {asked}" + (f" ({reference})" if reference != asked else ""),
            f"images.lock names: {known}; `harness build` makes them",
        )
    return str(facts["Id"]), facts


def _name(asked: str, facts: dict[str, Any]) -> str:
    """Which of our images it is, by its labels, or by the name it was asked for."""
    labels = (facts.get("Config") or {}).get("Labels") or {}
    name = f"{labels.get('harness.environment')}-{labels.get('harness.variant')}"
    known = {f"{env}-{variant}" for env in get_args(EnvironmentName) for variant in get_args(Variant)}
    name = name if name in known else asked
    if name not in known:
        raise HarnessError(f"{asked} is no image of harness: it has no label harness.environment",
                           "verify an image that `harness build` made")  # fmt: skip
    return name


def _against_images_lock(image: str, name: str, locked: ImageLock) -> tuple[Check, ...]:
    entry = locked.images.get(name)
    if entry is None:
        return (Check(what="images.lock", state="wrong", detail=f"it does not name {name}"),)
    if entry.image != image:
        return (Check(what="images.lock", state="wrong", detail=f"it names {entry.image} as {name}, not this one"),)
    return (Check(what="images.lock", state="ok", detail=f"names this image as {name}"),)


def _against_requirements(name: str, root: Path, facts: dict[str, Any], contents: Contents) -> tuple[Check, ...]:
    """The lock that the image says it was built from is the checkout's, and it holds what that lock says."""
    environment, variant = name.split("-")
    path = root / "images" / environment / f"{variant}.txt"
    label = ((facts.get("Config") or {}).get("Labels") or {}).get("harness.lock")
    digest = requirements.digest(path)
    same = Check(what="lock digest", state="ok", detail=digest)
    if label != digest:
        same = Check(what="lock digest", state="wrong", detail=f"built from {label}, the checkout's lock is {digest}")
    wrong = lock_differences(contents.versions, read_lock(path.read_text(encoding="utf-8")))
    if not wrong:
        count = f"{len(contents.distributions)} packages are as locked"
        return (same, Check(what="versions", state="ok", detail=count))
    return (same, *(Check(what="versions", state="wrong", detail=difference) for difference in wrong))


def _make(facts: dict[str, Any], contents: Contents) -> tuple[Check, ...]:
    """How the image is made: its user, no compiler, its list of packages."""
    listed = Check(what="package list", state="ok", detail="/opt/harness/packages.cdx.json")
    if not contents.packages:
        listed = Check(what="package list", state="wrong", detail="/opt/harness/packages.cdx.json is missing")
    user = Check(what="user", state="ok", detail=f"uid {contents.uid}")
    if contents.uid == 0:
        user = Check(what="user", state="wrong", detail="it runs as root")
    found = ", ".join(contents.compilers)
    compiler = Check(what="compilers", state="wrong" if found else "ok", detail=found or "none on PATH")
    return (user, compiler, listed)


def _imports(client: DockerClient, image: str, contents: Contents) -> tuple[Attempt, ...]:
    names = sorted({name for found in contents.distributions.values() for name in found.imports})
    return probe.attempts(client, image, "imports", names)


def _judged_imports(imports: tuple[Attempt, ...]) -> tuple[Check, ...]:
    failed = tuple(_judged(f"import {attempt.name}", attempt) for attempt in imports if not attempt.ok)
    good = len(imports) - len(failed)
    return (Check(what="imports", state="ok", detail=f"{good} of {len(imports)} modules import"), *failed)


def _judged(what: str, attempt: Attempt) -> Check:
    """An attempt's outcome; what failed for want of a GPU is unchecked, not wrong."""
    if attempt.ok:
        return Check(what=what, state="ok", detail=f"{attempt.seconds:.1f} s")
    for_want = any(words in attempt.error for words in NEEDS_GPU)
    return Check(what=what, state="unchecked" if for_want else "wrong", detail=attempt.error)


def _kernels(client: DockerClient, image: str, name: str, contents: Contents) -> tuple[Check, ...]:
    cuda = (contents.cuda or "").replace(".", "")
    found = []
    for kind in ("native", "imports"):
        asked = {where.format(cuda=cuda): what for what, how, where in KERNELS[name] if how == kind}
        if asked:
            attempts = probe.attempts(client, image, kind, list(asked))
            found += [_judged(asked[attempt.name], attempt) for attempt in attempts]
    return tuple(found)
