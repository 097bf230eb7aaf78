"""Which environment variables of this process a payload may see."""

from __future__ import annotations

from collections.abc import Mapping

NAMES = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD",
    "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE", "XDG_CACHE_HOME",
    "HF_HOME", "HF_HUB_CACHE",
    "CC", "CXX",
})  # fmt: skip
"""Where libraries, compilers and caches are, and in which language to speak."""

PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "FI_", "NVSHMEM_", "TORCH_")
"""Settings of the GPU's driver and of the network between ranks, which a site makes."""

SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "KEY")
"""A variable with one of these in its name never reaches a payload, whatever else it starts with (NVIDIA_API_KEY)."""


def allowed(environment: Mapping[str, str]) -> dict[str, str]:
    """What of `environment` a payload may see."""
    return {name: value for name, value in environment.items() if _may_pass(name)}


def _may_pass(name: str) -> bool:
    secret = any(word in name.upper() for word in SECRET_WORDS)
    return not secret and (name in NAMES or name.startswith(PREFIXES))
