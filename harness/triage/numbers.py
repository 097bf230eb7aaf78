"""Numbers and names that a log states, for next steps: settings of the job, sizes that were asked for, ports, paths."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

from harness.triage.checks import others

_SET = r"[\"']?\s{0,3}[=:]?\s{0,3}[\"']?"
FORMS: Mapping[str, re.Pattern[str]] = {
    name: re.compile(form)
    for name, form in {
        "max_model_len": rf"max[_ -](?:model[_-]len|seq len)(?:{_SET}|\s\()(\d{{2,9}})",
        "fitting_max_model_len": r"estimated maximum model length is (\d{2,9})",
        "kv_needed": r"\(?(\d[\d.]*) GiB KV\s+cache is needed",
        "kv_available": r"available KV cache memory \((\d[\d.]*) GiB",
        "tried": r"Tried to allocate (\d[\d.]* [KMG]iB)",
        "free": r"of which (\d[\d.]* \w+) is free",
        "free_gib": r"Free memory on device [^(\n]{0,20}\((\d[\d.]*)/",
        "total_gib": r"Free memory on device [^(\n]{0,20}\(\d[\d.]*/(\d[\d.]*)",
        "seq_len": rf"(?:max_seq_len(?:gth)?|max_seq_length|cutoff_len|block_size|max_length){_SET}(\d{{2,9}})\b",
        "micro_batch": r"(?:per_device_train_batch_size|micro_batch(?:_size)?|Instantaneous batch size per device)"
        rf"{_SET}(\d{{1,6}})\b",
        "eval_batch": rf"per_device_eval_batch_size{_SET}(\d{{1,6}})\b",
        "grad_accum": rf"(?:gradient_accumulation_steps|Gradient Accumulation steps){_SET}(\d{{1,6}})\b",
        "max_num_seqs": rf"max[_-]num[_-]seqs{_SET}(\d{{1,6}})\b",
        "tensor_parallel": rf"tensor[_-]parallel[_-]size{_SET}(\d{{1,4}})\b",
        "learning_rate": rf"learning[_ ]rate{_SET}(\d[\d.]*(?:[eE]-?\d+)?)\b",
        "port": r"(?:port: |[Pp]ort |', |:)(\d{4,5})(?:\b[^\n]{0,80}(?:in use|EADDRINUSE))",
        "shm_bytes": r"failed to extend /dev/shm\S{0,80} to (\d+) bytes",
        "ifname": r"NCCL_SOCKET_IFNAME set (?:by environment )?to (\S{1,40})",
        "ib_peer": r"completion from peer ([\w.:-]{3,60})",
        "joined": r"(\d{1,5}/\d{1,5}) clients joined",
        "master": r"connect to \(?\[?([\w.:-]{3,80}?)(?:, ?|\]:)\d{2,5}\b",
        "library": r"No module named '([\w.]{1,80})'",
        "lora_targets": r"Target modules (.{1,160}?) not found",
        "repository": r"(?:Repo model |gated repo )([\w./-]{3,100}?)(?: is|\.)",
        "path": r"(?:No space left on device|Permission denied|quota exceeded)[^\n]{0,10}: '([^'\n]{1,200})'",
        "divisor_wanted": r"(\d{1,9}[^\n]{0,60}divisible by[^\n]{0,60}?\d{1,9})",
    }.items()
}


def numbers_in(text: str, may: Container[str]) -> dict[str, str]:
    """What one line states, by the names that next steps use; only forms `number:<name>` in `may` are tried."""
    found = {name: match[1] for name, form in FORMS.items() if f"number:{name}" in may and (match := form.search(text))}
    if " memory in use" in text and (held := others(text)):
        pid, size = max(held, key=lambda one: one[1])
        found |= {"foreign_pid": str(pid), "foreign_gib": f"{size:.1f} GiB"}
    return found


def with_steps(stated: Mapping[str, str]) -> dict[str, object]:
    """The stated numbers and those one step down a ladder; a number that has no step down is left out."""
    known: dict[str, object] = {"variant": "the model", **stated}
    for name in ("seq_len", "micro_batch", "eval_batch", "max_num_seqs", "max_model_len"):
        value = int(stated.get(name, "0"))
        if value > 1:
            known[f"half_{name}"] = value // 2
    for name in ("grad_accum", "tensor_parallel"):
        if name in stated:
            known[f"double_{name}"] = 2 * int(stated[name])
    if "half_micro_batch" in known and "grad_accum" not in stated:
        known |= {"grad_accum": 1, "double_grad_accum": 2}
    if "learning_rate" in stated:
        known["tenth_learning_rate"] = f"{float(stated['learning_rate']) / 10:g}"
    return known
