"""Refresh every lock with uv and show the difference; standard library only. Started by `tools/lock`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from environments import PLACES, ROOT, TORCH_INDEX, must, pip_settings, uv_environment

TORCH_WHEELS = ROOT / "tools/requirements/torch.sha256"
IN_IMAGES_ALONE = ("build/tools.txt", "train/build-cuda.txt", "train/cuda.txt", "serve/cuda.txt")
"""Locks under images/ that no environment of this checkout is made from."""
COMPILE = ("--universal", "--python-version", "3.11", "--generate-hashes", "--no-emit-index-url", "--no-header", "-q")


def wheel_hashes(text: str) -> dict[str, set[str]]:
    """The lines `requirement interpreter sha256` of a hash file, as hashes by requirement."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            requirement, _, digest = line.split()
            found.setdefault(requirement, set()).add(digest)
    return found


def add_hashes(lock: str, extra: dict[str, set[str]]) -> str:
    """`lock` where each requirement of `extra` has those hashes too, sorted as uv sorts them."""
    return "".join("".join(_entry(block, extra)) for block in _blocks(lock))


def _blocks(lock: str) -> Iterator[list[str]]:
    """The lines of `lock`, one list for each requirement."""
    block: list[str] = []
    for line in lock.splitlines(keepends=True):
        if block and line[:1].strip():
            yield block
            block = []
        block.append(line)
    yield block


def _entry(block: list[str], extra: dict[str, set[str]]) -> list[str]:
    """One requirement's lines, with its hashes of `extra` among them."""
    requirement = block[0].split(" ")[0].strip() if block else ""
    if requirement not in extra:
        return block
    digests = {line.split("sha256:")[1].strip(" \\\n") for line in block if "--hash=" in line} | extra[requirement]
    lines = [f"    --hash=sha256:{digest}" for digest in sorted(digests)]
    return [block[0], " \\\n".join(lines) + "\n", *(line for line in block[1:] if "--hash=" not in line)]


def compile_lock(lock: Path, arguments: Sequence[str]) -> None:
    """Let uv resolve the `.in` file beside `lock`."""
    settings = pip_settings()
    override = lock.with_suffix(".override")
    argv: list[str | Path] = [PLACES["uv"].directory / "bin/uv", "--directory", lock.parent, "pip", "compile", *COMPILE]
    if lock.name == "cpu.txt":  # for a CUDA build these places would win: 2.13.0+cpu counts as newer than 2.13.0
        links = settings.get("find-links", "").split()
        argv += [f"--find-links={where}" for where in links] or [f"--index={TORCH_INDEX}"]
    if override.exists():
        argv += ["--override", override.name]
    must([*argv, *arguments, "-o", lock.name, lock.with_suffix(".in").name], uv_environment(settings))


def versions(lock: str) -> list[str]:
    """The requirement lines of a lock, without hashes and comments."""
    return [line.rstrip(" \\") for line in lock.splitlines() if line[:1].strip() and not line.startswith("#")]


def locks() -> list[Path]:
    """Every lock of this checkout, each once."""
    return [*dict.fromkeys(place.lock for place in PLACES.values()), *(ROOT / "images" / n for n in IN_IMAGES_ALONE)]


def main(arguments: Sequence[str]) -> None:
    """Refresh every lock; print the versions that changed, or that none did."""
    extra = wheel_hashes(TORCH_WHEELS.read_text())
    for lock in locks():
        before = lock.read_text() if lock.exists() else ""
        compile_lock(lock, arguments)
        after = add_hashes(lock.read_text(), extra)
        lock.write_text(after)
        name = str(lock.relative_to(ROOT))
        changed = list(difflib.unified_diff(versions(before), versions(after), name, name, lineterm="", n=0))
        note = "same" if before == after else "same versions, other hashes or comments"
        print(*(changed or [f"{name}: {note}"]), sep="\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
