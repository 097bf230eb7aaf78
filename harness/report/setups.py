"""What is compared with what: cases that are one set-up at several lengths, loads or repeats, and where they ran."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from harness import catalog
from harness.report.words import TIMES, one_line, plural
from harness.schema import LOAD_FIELDS, NOT_IDENTITY, Record, ServeCase, TrainCase

_SAME_SETUP = frozenset({"seq_len", "memory_cap_gib", "repeat", "seed", "steps", "warmup_steps", "learning_rate",
                         "lora_alpha", *NOT_IDENTITY})  # fmt: skip
"""Fields of a training case that move neither memory nor speed, or that the set-ups are compared over."""
_NAMED = frozenset({"kind", "variant", "device", "method", "strategy", "devices", "nodes", "adapter",
                    "tensor_parallel"})  # fmt: skip
"""Fields that the first words of a label say."""
_WORDS: Mapping[str, Callable[[Any], str]] = {
    "micro_batch": lambda value: f"batch {value}",
    "grad_accum": lambda value: f"{value} accumulated",
    "activation_checkpointing": lambda value: "no checkpointing",
    "cpu_offload": lambda value: "CPU offload",
    "param_dtype": str,
    "lora_rank": lambda value: f"rank {value}",
    "enforce_eager": lambda value: "no graphs",
    "optimizer": str,
    "attention": str,
}


def place(case: TrainCase) -> str:
    """Where a training case runs: `1 device`, `ddp`, its devices, and its nodes where they are several."""
    nodes = f" on {case.nodes} nodes" if case.nodes > 1 else ""
    return (
        f"{case.strategy} {TIMES} {case.devices}{nodes}" if case.strategy != "none" else plural(case.devices, "device")
    )


def options(case: TrainCase | ServeCase) -> str:
    """What was asked besides variant, method and place, where not the default: `batch 4, no checkpointing`."""
    same = _SAME_SETUP if isinstance(case, TrainCase) else LOAD_FIELDS
    usual = _usual(case)
    names = [name for name in type(case).model_fields if name not in same | _NAMED]
    apart = [_word(name, value) for name in names if (value := getattr(case, name)) != usual[name]]
    return one_line(", ".join(apart), 120)


def _word(name: str, value: Any) -> str:
    return _WORDS[name](value) if name in _WORDS else f"{name} {plain(value)}"


def _usual(case: BaseModel) -> dict[str, Any]:
    """The default of each field; of the targets, the variant's own."""
    usual = {name: field.default for name, field in type(case).model_fields.items()}
    if isinstance(case, TrainCase):
        known = catalog.variants().get(case.variant)
        usual["lora_targets"] = known.lora_targets if known and case.method != "full" else ()
        usual["lora_rank"] = 0 if case.method == "full" else usual["lora_rank"]
        usual["optimizer"] = "adamw_torch" if case.device == "cpu" else usual["optimizer"]
    return usual


def plain(value: Any) -> str:
    """A field's value in a label: `24`, `in_proj q_proj`."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def training_setup(case: TrainCase) -> str:
    """All of a training case but its length, the size of the card, and what moves no number; equal ones compare."""
    return ", ".join(part for part in (f"{case.variant} {case.method}", place(case), options(case)) if part)


def server_setup(case: ServeCase) -> str:
    """All of a serving case but its load."""
    model = "" if case.adapter == "none" else f" {one_line(case.adapter.split('/')[-1], 40)}"
    return ", ".join(part for part in (f"{case.variant}{model}", f"tp {case.tensor_parallel}", options(case)) if part)


def gpu_name(record: Record) -> str:
    """The first GPU's name without its maker; `CPU` for a case on one."""
    if record.case.device == "cpu":
        return "CPU"
    where = record.provenance
    return one_line(where.gpus[0].name.removeprefix("NVIDIA "), 40) if where and where.gpus else "unnamed GPU"


def where(record: Record, beside: str = "") -> str:
    """The GPU that a case ran on, and the run's name where another stands beside it."""
    return f"{gpu_name(record)}, {beside}" if beside else gpu_name(record)
