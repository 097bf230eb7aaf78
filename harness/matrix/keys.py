"""The keys that a block takes, and how each value is read and checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from harness import catalog
from harness.catalog import nearest
from harness.matrix import asked
from harness.matrix.source import Node, refuse_unknown, shown
from harness.schema import CaseBase, Frozen, LadderAsked, ProbeCase, ServeCase, TrainCase

Read = Callable[[str, Node], Any]
"""Key and node -> the value of one point; HarnessError where it cannot be one."""

_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>s|m|h)")
_SIZE = re.compile(r"(?P<number>\d{1,12}) ?(?P<unit>B|KiB|MiB|GiB)?")
_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@cache
def _adapter(case: type[Frozen], name: str) -> TypeAdapter[Any]:
    field = case.model_fields[name]
    kind: Any = field.annotation
    for constraint in field.metadata:
        kind = Annotated[kind, constraint]
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))


def _field(case: type[Frozen], name: str, key: str, node: Node) -> Any:
    """A value as the case's field of that name allows it, nothing converted."""
    try:
        return _adapter(case, name).validate_python(node.value, strict=True)
    except ValidationError as problem:
        error = problem.errors()[0]
        return node.fail(f"{key}: {_complaint(error['type'], error.get('ctx', {}), node)}")


def _complaint(kind: str, context: dict[str, Any], node: Node) -> str:
    """A sentence for what pydantic found wrong."""
    value = shown(node)
    if kind == "literal_error":
        words = re.findall(r"'([^']*)'", context["expected"])
        return f"{value} is not one of {', '.join(words)}{nearest(str(node.value), words)}"
    bounds = {"greater_than_equal": ("at least", "ge"), "greater_than": ("more than", "gt")}
    bounds |= {"less_than_equal": ("at most", "le"), "less_than": ("less than", "lt")}
    if kind in bounds:
        words_, name = bounds[kind]
        return f"must be {words_} {context[name]:g}, not {value}"
    wanted = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a word"}
    wanted["finite"] = "a finite number"
    return f"must be {wanted.get(kind.split('_')[0], 'another kind of value')}, not {value}"


def _variant(key: str, node: Node) -> str:
    if node.value not in catalog.variants():
        known = list(catalog.variants())
        node.fail(f"{key}: no variant is called {shown(node)}{nearest(str(node.value), known)}",
                  f"the catalog has: {', '.join(known)}")  # fmt: skip
    return str(node.value)


def _seconds(key: str, node: Node) -> float:
    """Seconds as a number, or with a unit: 90, "90s", "10m", "2h"."""
    match = _DURATION.fullmatch(str(node.value))
    if isinstance(node.value, bool) or not (match or isinstance(node.value, int | float)):
        node.fail(f"{key}: must be seconds or a time such as 10m or 2h, not {shown(node)}")
    value = float(match["number"]) * _SECONDS[match["unit"]] if match else float(node.value)
    if not 0 < value < float("inf"):
        node.fail(f"{key}: must be more than 0 seconds, not {shown(node)}")
    return value


def _sizes(key: str, node: Node) -> tuple[int, ...]:
    """Bytes, as numbers or with a unit: 4096, "16MiB"; what is reduced are numbers of 4 bytes."""
    if not isinstance(node.value, list) or not node.value:
        node.fail(f"{key}: must be a list of sizes, not {shown(node)}", "such as [1KiB, 1MiB, 64MiB]")
    return tuple(_size(key, item) for item in node.value)


def _size(key: str, node: Node) -> int:
    match = _SIZE.fullmatch(str(node.value))
    if isinstance(node.value, bool) or not match:
        node.fail(f"{key}: must be bytes or a size such as 64MiB, not {shown(node)}")
    size = int(match["number"]) * _BYTES[match["unit"] or "B"]
    if size % 4 or not 4 <= size <= 2**34:
        node.fail(f"{key}: must be a multiple of 4 bytes, at most 16GiB, not {shown(node)}")
    return size


def _targets(key: str, node: Node) -> tuple[str, ...]:
    if not isinstance(node.value, list) or not node.value:
        node.fail(f"{key}: must be a list of module names, not {shown(node)}", "such as [in_proj, q_proj]")
    return tuple(_field(CaseBase, "variant", key, name) for name in node.value)


def _path_or(words: tuple[str, ...], need: str, what: str, key: str, node: Node) -> str:
    """One of `words`, or the absolute path of something that exists, relative paths taken from the matrix's folder.

    `need` is a file that a folder must hold, or empty where a file itself is wanted.
    """
    if node.value in words:
        return str(node.value)
    text = _field(CaseBase, "variant", key, node)
    path = (Path(node.file).parent / text).resolve()
    if path.joinpath(need).is_file():
        return str(path)
    missing = f"{path} has no {need}" if need and path.is_dir() else f"there is no {path}"
    return node.fail(f"{key}: {shown(node)} is neither {', '.join(words)} nor {what}: {missing}{nearest(text, words)}")


def _load_point(key: str, node: Node) -> dict[str, Any]:
    found = node.mapping(key)
    refuse_unknown(found, LOAD, key)
    return {name: LOAD[name](f"{key}: {name}", value) for name, value in found.items()}


def _of(case: type[Frozen], *names: str) -> dict[str, Read]:
    return {name: partial(_field, case, name) for name in names}


LOAD: dict[str, Read] = _of(ServeCase, "concurrency", "input_len", "output_len", "requests")
"""Keys of a load point."""

WEIGHTS = partial(_path_or, ("random", "hub"), "config.json", "the folder of a saved model")
DATA = partial(_path_or, ("synthetic",), "", "a JSONL file")


def _adapter_to_serve(key: str, node: Node) -> str:
    if node.value in ("adapter", "merged"):
        node.fail(
            f"{key}: {node.value} is what a chain has trained", "use a chain block, or give a saved adapter's folder"
        )
    return _path_or(("none",), "adapter_config.json", "the folder of a saved adapter", key, node)


def _trained(key: str, node: Node) -> str:
    if node.value not in ("adapter", "merged"):
        node.fail(f"{key}: a chain serves what it trained: adapter or merged, not {shown(node)}")
    return str(node.value)


COMMON: dict[str, Read] = {
    "variant": _variant,
    **_of(CaseBase, "device", "param_dtype", "thinking", "seed"),
    "weights": WEIGHTS,
    "repeat": partial(_field, TrainCase, "micro_batch"),
    "time_limit": _seconds,
    "stall": _seconds,
    "ladder": asked.ladder,
    "ladder_order": partial(_field, LadderAsked, "order"),
    "ladder_tries": partial(_field, LadderAsked, "tries"),
    "ladder_minutes": partial(_field, LadderAsked, "minutes"),
}
"""Keys of every block."""
SETTINGS = frozenset({"ladder", "ladder_order", "ladder_tries", "ladder_minutes", "frontier"})
"""Keys that say what to do with a block's cases and are no part of them; they have one value."""

TRAIN_ONLY: dict[str, Read] = {
    **_of(TrainCase, "method", "seq_len", "micro_batch", "grad_accum", "devices", "nodes", "strategy", "cpu_offload"),
    **_of(TrainCase, "activation_checkpointing", "optimizer", "learning_rate", "lora_rank", "lora_alpha"),
    "lora_targets": _targets,
    **_of(TrainCase, "attention", "steps", "warmup_steps"),
    "data": DATA,
    "memory_cap_gib": partial(_field, TrainCase, "memory_cap_gib"),
    "checkpoints": partial(_field, TrainCase, "checkpoints"),
    "frontier": partial(asked.frontier, asked.OF_TRAINING),
}

NOT_IN_CHAIN = frozenset({"memory_cap_gib", "frontier"})
"""Keys of training that a chain does not take: its server would run uncapped, under the same label, or unasked."""

SERVE_ONLY: dict[str, Read] = {
    **_of(ServeCase, "tensor_parallel", "max_model_len", "max_num_seqs"),
    "adapter": _adapter_to_serve,
    **_of(ServeCase, "enforce_eager", "cudagraph_max", "gpu_memory_utilization", "mamba_ssm_cache_dtype"),
    "load": _load_point,
    "frontier": partial(asked.frontier, asked.OF_SERVING),
}

CHAIN_SERVE_ONLY: dict[str, Read] = {
    **{name: read for name, read in SERVE_ONLY.items() if name not in NOT_IN_CHAIN},
    "adapter": _trained,
}

PROBE: dict[str, Read] = {
    **_of(ProbeCase, "device", "devices", "nodes", "interface", "p2p", "iterations", "debug"),
    "sizes": _sizes,
    **{name: COMMON[name] for name in ("repeat", "time_limit", "stall", "ladder", "ladder_tries", "ladder_minutes")},
}
"""Keys of a probe, which has no model."""

FIELDS = {"time_limit": "time_limit_s", "stall": "stall_s", "sizes": "sizes_bytes"}
"""Keys that are called otherwise in a case."""
