"""Facts about adapters and weight files, read from safetensors with the standard library alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHUNK = 1 << 24


def rank(adapter: Path) -> int:
    """The largest LoRA rank that `adapter_config.json` names."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def trivial(adapter: Path) -> bool | None:
    """Are all `lora_B` zero, so that the adapter changes nothing; `None` where the file is not safetensors."""
    file = adapter / "adapter_model.safetensors"
    if not file.exists():
        return None
    wanted = [(begin, end) for name, (_, begin, end) in _tensors(file).items() if ".lora_B" in name]
    return bool(wanted) and not any(any(chunk) for begin, end in wanted for chunk in _chunks(file, begin, end))


def weights_differ(left: Path, right: Path) -> bool | None:
    """Does any tensor of the same name and dtype differ between two models; `None` where none can be compared."""
    ours, theirs = _all_tensors(left), _all_tensors(right)
    shared = [name for name in ours if name in theirs and ours[name][1][0] == theirs[name][1][0]]
    for name in shared:
        (file_a, (_, *span_a)), (file_b, (_, *span_b)) = ours[name], theirs[name]
        pairs = zip(_chunks(file_a, *span_a), _chunks(file_b, *span_b), strict=False)
        if span_a[1] - span_a[0] != span_b[1] - span_b[0] or any(a != b for a, b in pairs):
            return True
    return False if shared else None


def _all_tensors(folder: Path) -> dict[str, tuple[Path, tuple[str, int, int]]]:
    return {
        name: (file, span) for file in sorted(folder.glob("*.safetensors")) for name, span in _tensors(file).items()
    }


def _tensors(file: Path) -> dict[str, tuple[str, int, int]]:
    """Name -> dtype, first and last byte in the file: an 8-byte length, a JSON header, then the data."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    return {
        name: (entry["dtype"], 8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _chunks(file: Path, begin: int, end: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(begin)
        while begin < end and (chunk := stream.read(min(_CHUNK, end - begin))):
            begin += len(chunk)
            yield chunk
