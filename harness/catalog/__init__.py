"""Facts about models, methods, strategies and GPUs: YAML beside this file, read once, checked, frozen."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue
from ruamel.yaml import YAML

from harness.errors import HarnessError
from harness.schema import Frozen, Method, Optimizer, Strategy

_HERE = Path(__file__).parent
_LAYER_NAMES = {"M": "mamba", "-": "mlp", "E": "moe", "*": "attention"}
"""Letters of `hybrid_override_pattern` (transformers, `configuration_nemotron_h.py`)."""


class Serving(Frozen):
    """How a variant is served by vLLM."""

    thinking: Literal["message", "template_kwarg"]
    """Where the thinking switch stands: `/no_think` in a message, or the template argument `enable_thinking`."""
    mamba_ssm_cache_dtype: str
    mamba_ssm_cache_dtype_required: bool = False
    """The model's documentation forbids any other."""
    tool_parser: str | None = None
    tool_parser_plugin: str | None = None
    """File in the checkpoint folder that defines `tool_parser`; `None` where it is built into vLLM."""
    reasoning_parser: str | None = None
    """Built into vLLM."""
    reasoning_parser_plugin: str | None = None
    """File in the checkpoint folder, for a vLLM without the built-in one."""
    reasoning_parser_with_plugin: str | None = None
    source: str | None = None


class Needs(Frozen):
    """What the vendor asks for, as its documentation states it; not what was measured."""

    gpus: int
    gpu_memory_gb: float
    nodes: str
    storage_gb: float
    """For the model weights."""
    source: str


class Variant(Frozen):
    """A model that can be trained and served, with its exact shape."""

    name: str
    title: str
    about: str
    checkpoint: str | None
    """Hub id; `None` for a shape that only exists with random weights."""
    revision: str | None = None
    config: dict[str, JsonValue]
    """Content of transformers' config.json, model type `nemotron_h`."""
    chat_template: Literal["chatml", "nemotron_v2"]
    parameters: int
    """In all, from the shape."""
    lora_targets: tuple[str, ...]
    keep_unquantized: tuple[str, ...]
    serving: Serving
    needs: Needs
    source: str
    """Where the shape comes from."""

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens, that the model's own configuration allows."""
        return int(str(self.config["max_position_embeddings"]))

    @property
    def mamba_width(self) -> int:
        """Values per token that a Mamba layer's kernels read: gate, x, B, C and dt, as `in_proj` gives them."""
        heads, head, groups, state = (
            int(str(self.config[name])) for name in ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
        )
        return 2 * heads * head + 2 * groups * state + heads

    @property
    def layers(self) -> dict[str, int]:
        """How many layers there are of each type: mamba, mlp, moe, attention."""
        pattern = str(self.config["hybrid_override_pattern"])
        return {name: pattern.count(letter) for letter, name in _LAYER_NAMES.items()}

    def payload(self) -> dict[str, JsonValue]:
        """What a payload needs to know of the variant, as JSON values."""
        left_out = {"title", "about", "parameters", "needs", "source"}
        found: dict[str, JsonValue] = self.model_dump(mode="json", exclude=left_out)
        return {**found, "layers": dict(self.layers)}


class MethodFacts(Frozen):
    """One way to fine-tune."""

    name: Method
    about: str
    adapter: bool
    """Trains a LoRA adapter and leaves the base frozen."""
    quantized: bool
    """The frozen base is held in 4 bits."""


class StrategyFacts(Frozen):
    """One way to use several devices."""

    name: Strategy
    about: str
    min_devices: int
    max_devices: int | None
    accelerate: dict[str, JsonValue] | None
    """What its accelerate configuration file says beyond the common part; `None` where accelerate has no part in it."""


class OptimizerFacts(Frozen):
    """One optimizer, as transformers names it."""

    name: Optimizer
    about: str
    needs_cuda: bool
    reason: str = ""
    """Why it needs CUDA."""


class GpuFacts(Frozen):
    """What a GPU can do by its data sheet."""

    name: str
    patterns: tuple[str, ...]
    """Regular expressions, searched in the name that the driver gives; the first entry that matches holds."""
    memory_gb: float
    """As marketed."""
    bf16_flops: float
    """Peak dense bf16 tensor FLOP/s."""
    memory_bytes_per_s: float
    compute_capability: str
    source: str


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the word in `known` nearest to `word`, or nothing where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = YAML(typ="safe", pure=True).load((_HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


def _config(name: str) -> dict[str, JsonValue]:
    content: dict[str, JsonValue] = json.loads((_HERE / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    return content


@cache
def variants() -> dict[str, Variant]:
    """Every variant by name, in the order of variants.yaml."""
    entries = _read("variants")
    whole = ({"name": name, **entry, "config": _config(entry["config"])} for name, entry in entries.items())
    return {entry["name"]: Variant.model_validate(entry) for entry in whole}


def variant(name: str) -> Variant:
    """The variant called `name`; HarnessError naming the nearest one where there is none."""
    if name not in variants():
        hint = f"The catalog has: {', '.join(variants())}."
        raise HarnessError(f"no variant is called {name!r}{nearest(name, variants())}", hint)
    return variants()[name]


@cache
def methods() -> dict[str, MethodFacts]:
    """Every fine-tuning method by name."""
    return {name: MethodFacts.model_validate({"name": name, **entry}) for name, entry in _read("methods").items()}


@cache
def strategies() -> dict[str, StrategyFacts]:
    """Every parallel strategy by name."""
    return {name: StrategyFacts.model_validate({"name": name, **entry}) for name, entry in _read("strategies").items()}


@cache
def optimizers() -> dict[str, OptimizerFacts]:
    """Every optimizer by name."""
    return {name: OptimizerFacts.model_validate({"name": name, **entry}) for name, entry in _read("optimizers").items()}


@cache
def gpus() -> tuple[GpuFacts, ...]:
    """Every known GPU, the more special name first."""
    return tuple(GpuFacts.model_validate({"name": name, **entry}) for name, entry in _read("gpus").items())


def gpu(driver_name: str) -> GpuFacts | None:
    """Facts about the GPU that the driver calls so, or `None` for one that the catalog does not know: no guess."""
    return next((facts for facts in gpus() if any(re.search(found, driver_name) for found in facts.patterns)), None)


def oldest_driver(cuda: str | None) -> str | None:
    """The oldest driver for a CUDA version such as `13.0`; `None` where the catalog does not know it, or for none."""
    entry = _read("cuda").get((cuda or "").partition(".")[0])
    return str(entry["oldest_driver"]) if entry else None
