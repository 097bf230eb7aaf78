"""A signature's words filled in with the values of the case at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.schema import Case, Observation, ProbeCase, ServeCase, TrainCase
from harness.triage.held import GIB, held
from harness.triage.missing import serving_of, training_of

OF_THE_BATCH = frozenset({"seq_len", "half_seq_len", "micro_batch", "half_micro_batch", "grad_accum",
                          "double_grad_accum", "checkpointing_off"})  # fmt: skip
"""Names of values that a next step would change to make activations smaller."""


def values(case: Case, observation: Observation | None = None) -> dict[str, object]:
    """What `{...}` in a summary or a next step may name; a value that has no further step down is not among them.

    Nor are length and batch where what was observed says that none fits.
    """
    train, serve = training_of(case), serving_of(case)
    if isinstance(case, ProbeCase):
        return {"devices": case.devices, "time_limit_s": f"{case.time_limit_s:g}",
                "double_time_limit_s": f"{2 * case.time_limit_s:g}"}  # fmt: skip
    found: dict[str, object] = {"variant": case.variant}
    if serve:
        found |= _serving(serve)
    if train:
        found |= _training(train)
    if train and observation and (bound := held(train, observation)) and bound.too_much:
        found = {name: value for name, value in found.items() if name not in OF_THE_BATCH}
        found |= {"held_gib": f"{bound.held / GIB:.2f}", "room_gib": f"{bound.room / GIB:.2f}"}
    return found


def _training(case: TrainCase) -> dict[str, object]:
    found: dict[str, object] = {
        "method": case.method,
        "optimizer": case.optimizer,
        "devices": case.devices,
        "steps": case.steps,
        "lora_targets": ", ".join(case.lora_targets) or "none",
        "learning_rate": f"{case.learning_rate:g}",
        "tenth_learning_rate": f"{case.learning_rate / 10:g}",
        "time_limit_s": f"{case.time_limit_s:g}",
        "double_time_limit_s": f"{2 * case.time_limit_s:g}",
    }
    if case.seq_len >= 16:
        found |= {"seq_len": case.seq_len, "half_seq_len": case.seq_len // 2}
    if case.micro_batch > 1:
        found |= {"micro_batch": case.micro_batch, "half_micro_batch": case.micro_batch // 2}
        found |= {"grad_accum": case.grad_accum, "double_grad_accum": 2 * case.grad_accum}
    if case.method != "qlora":
        found["before_qlora"] = case.method
    if case.devices > 1 and case.strategy != "fsdp":
        found["before_fsdp"] = case.strategy
    if not case.optimizer.endswith("8bit"):
        found["before_8bit"] = case.optimizer
    if not case.activation_checkpointing:
        found["checkpointing_off"] = "off"
    if case.memory_cap_gib is not None:
        found["memory_cap_gib"] = f"{case.memory_cap_gib:g}"
    return found


def _serving(case: ServeCase) -> dict[str, object]:
    found: dict[str, object] = {
        "gpu_memory_utilization": f"{case.gpu_memory_utilization:g}",
        "tensor_parallel": case.tensor_parallel,
        "adapter": case.adapter,
        "time_limit_s": f"{case.time_limit_s:g}",
        "double_time_limit_s": f"{2 * case.time_limit_s:g}",
    }
    if case.max_model_len >= 32:
        found |= {"max_model_len": case.max_model_len, "half_max_model_len": case.max_model_len // 2}
    if case.max_num_seqs > 1:
        found |= {"max_num_seqs": case.max_num_seqs, "half_max_num_seqs": case.max_num_seqs // 2}
    if not case.enforce_eager:
        found["eager_off"] = "false"
    return found


def fill(template: str, known: Mapping[str, object]) -> str | None:
    """`template` with its values, or `None` where the case lacks one."""
    try:
        return template.format_map(known)
    except KeyError:
        return None


def first(templates: Sequence[str], known: Mapping[str, object]) -> str:
    """The first of `templates` whose values the case has; the last one needs none."""
    return next((text for template in templates if (text := fill(template, known)) is not None), templates[-1])
