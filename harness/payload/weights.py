"""Saved weights in the hub's layout, read row by row and written part by part: nobody needs the whole model for it.

Names and shapes differ from transformers' in two ways (transformers 5.17 to 5.23, `conversion_mapping.py`, nemotron_h):
`backbone.` is `model.` there, and the routed experts of a layer are one 3-D parameter instead of one matrix each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EXPERTS = re.compile(r"(?P<layer>.*\.experts)\.(?P<weight>up_proj|down_proj)$")


def hub_name(name: str) -> str:
    """A parameter's name in a checkpoint; a layer's experts have one name with `*` for the expert's number."""
    name = re.sub(r"^model\.", "backbone.", name)
    return EXPERTS.sub(r"\g<layer>.*.\g<weight>.weight", name)


def hub_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds of one parameter: itself, or its experts one by one."""
    found = hub_name(name)
    if "*" not in found:
        yield found, tensor
        return
    for number, expert in enumerate(tensor):
        yield found.replace("*", str(number)), expert


class Saved:
    """The tensors of a checkpoint directory, by the names of the model; nothing is read before its rows are asked."""

    def __init__(self, directory: Path) -> None:
        index = directory / INDEX
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        else:
            names = ((name, SINGLE) for name in _keys(directory / SINGLE))
        # Checkpoints of either spelling are read: the hub's, and the one that transformers has in memory.
        self._files = {re.sub(r"^model\.", "backbone.", name): (directory / file, name) for name, file in names}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the model's parameter `name`; KeyError where the checkpoint has none of that name."""
        wanted = hub_name(name)
        if "*" not in wanted:
            return self._read(wanted, start, stop)
        if (whole := re.sub(r"^model\.", "backbone.", name)) in self._files:
            return self._read(whole, start, stop)
        if start == stop:
            return self._one(wanted.replace("*", "0"))[None][:0]
        return torch.stack([self._one(wanted.replace("*", str(number))) for number in range(start, stop)])

    def _one(self, name: str) -> torch.Tensor:
        return self._read(name, None, None)

    def _read(self, name: str, start: int | None, stop: int | None) -> torch.Tensor:
        from safetensors import safe_open

        if name not in self._files:
            raise KeyError(f"the checkpoint has no tensor {name}")
        path, key = self._files[name]
        with safe_open(path, framework="pt") as tensors:
            found: torch.Tensor = tensors.get_slice(key)[start:stop] if stop is not None else tensors.get_tensor(key)
            return found


def _keys(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        return list(tensors.keys())


def locate(path: str, revision: str | None) -> Path:
    """The directory of a checkpoint: `path` itself, or where the hub's cache keeps the model of that id."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision))


def write(directory: Path, parts: Iterable[Iterable[tuple[str, torch.Tensor]]], writes: bool = True) -> None:
    """Write (name, tensor) of the model part by part, each into a file of its own, with the index that names them all.

    With `writes` false the parts are only gone through, as the other ranks must where a part is gathered from all.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts):
        kept: dict[str, torch.Tensor] = {}
        for name, tensor in part:
            if writes:
                kept |= {found: piece.cpu().contiguous() for found, piece in hub_tensors(name, tensor)}
        if kept:
            file = f"model-{number:05d}.safetensors"
            # A clone, because experts are views of one tensor, which safetensors refuses to write.
            save_file({name: tensor.clone() for name, tensor in kept.items()}, directory / file, {"format": "pt"})
            names |= dict.fromkeys(kept, file)
            total += sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    if writes:
        index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": names}
        (directory / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
