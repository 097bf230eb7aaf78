"""Which parsers of reasoning and of tool calls a server gets: built into vLLM, or a plugin beside the weights."""

from __future__ import annotations

import ast
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Parsers:
    """Reasoning and tool parser of a server, and a sentence for each that the variant names in vain."""

    reasoning: str | None = None
    tool: str | None = None
    notes: tuple[str, ...] = ()
    reasoning_plugin: str | None = None
    """The file that defines `reasoning`; None where vLLM has it built in."""
    tool_plugin: str | None = None


IN_THE_IMAGE = Path("/opt/harness/parsers")
"""Plugins that a container of ours has, for checkpoints that bring none."""


def parsers_for(variant: dict[str, Any], weights: str, known: dict[str, set[str]], folder: Path) -> Parsers:
    """The variant's parsers, as far as `known` (kind -> names built into vLLM) or a plugin in `folder` has them.

    None for what has no trained weights: what random ones write cannot be parsed.
    """
    serving = variant["serving"]
    wanted = {kind: name for kind in ("reasoning", "tool") if (name := serving.get(f"{kind}_parser"))}
    if not variant.get("checkpoint") or not wanted:
        return Parsers()
    if weights == "random":
        listed = " and ".join(f"{kind} parser {name}" for kind, name in wanted.items())
        return Parsers(notes=(f"Not used: {listed}; random weights write nothing to parse.",))
    found: dict[str, str] = {}
    notes = []
    for kind, name in wanted.items():
        plugin = serving.get(f"{kind}_parser_plugin")
        file = _file(plugin, folder) if plugin else None
        if name in known[kind]:
            found[kind] = name
        elif file:
            found |= {kind: serving.get(f"{kind}_parser_with_plugin") or name, f"{kind}_plugin": str(file)}
        else:
            notes.append(_missing(kind, name, plugin, variant["checkpoint"], folder))
    return Parsers(**found, notes=tuple(notes))


def _file(plugin: str, folder: Path) -> Path | None:
    return next((place / plugin for place in (folder, IN_THE_IMAGE) if (place / plugin).is_file()), None)


def _missing(kind: str, name: str, plugin: str | None, checkpoint: str, folder: Path) -> str:
    sentence = f"Not used: {kind} parser {name}, which this vLLM does not have built in"
    if plugin is None:
        return sentence + "."
    return (f"{sentence}, and its plugin {plugin} is not in {folder}. "
            f"To get it: hf download {checkpoint} {plugin} --local-dir {folder}")  # fmt: skip


def checkpoint_folder(model: str, revision: str | None) -> Path:
    """Where the files of a served model lie: itself, or the snapshot of that hub id in the local cache."""
    if Path(model).is_dir():
        return Path(model)
    home = os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub") / f"models--{model.replace('/', '--')}"
    named = cache / "refs" / (revision or "main")
    commit = named.read_text(encoding="utf-8").strip() if named.is_file() else revision or "main"
    return cache / "snapshots" / commit


def known_parsers() -> dict[str, set[str]]:
    """Parser names that the installed vLLM registers, read from its source because importing it takes seconds."""
    spec = importlib.util.find_spec("vllm")
    root = Path(spec.origin).parent if spec and spec.origin else Path("/nonexistent")
    folders = {"reasoning": root / "reasoning", "tool": root / "tool_parsers"}
    files = {kind: folder / "__init__.py" for kind, folder in folders.items()}
    return {kind: registered(file.read_text("utf-8")) if file.exists() else set() for kind, file in files.items()}


def registered(source: str) -> set[str]:
    """String keys of the dictionaries named `_..._PARSERS_TO_REGISTER` in a module's source."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id.endswith("_PARSERS_TO_REGISTER") and isinstance(value, ast.Dict):
            found |= {str(key.value) for key in value.keys if isinstance(key, ast.Constant)}
    return found
