"""Runs inside an image, as `python -c`: what is installed, and whether it can be imported. Standard library only.

`python -c TEXT installed` prints one JSON object; `python -c TEXT imports NAME...` prints one JSON line per import
name before it is tried (`try`) and one after (`ok`, `seconds`, `error`), so that a crash names its package; `native`
does the same for shared libraries of a package, given as `package:glob`.
"""

from __future__ import annotations

import ctypes
import glob
import importlib
import importlib.metadata as metadata
import importlib.util
import json
import os
import platform
import runpy
import sys
import time
import traceback
import warnings

APART = {"tests", "test", "docs", "doc", "examples", "example", "benchmarks", "scripts", "tools", "src", "bin"}
"""Folders that some distributions leave beside their package: not meant to be imported."""


def installed() -> dict[str, object]:
    """Python, every distribution with its import names, torch's CUDA, and who we are."""
    found: dict[str, dict[str, object]] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"] if distribution.metadata else None
        if name and name not in found:
            found[name] = {"version": distribution.version, "imports": import_names(distribution)}
    return {"python": platform.python_version(), "distributions": found, "cuda": torch_cuda(), "uid": os.getuid(),
            "compilers": [name for name in ("gcc", "g++", "cc", "clang", "nvcc") if on_path(name)],
            "packages": os.path.isfile("/opt/harness/packages.cdx.json")}  # fmt: skip


def on_path(name: str) -> bool:
    """Is there such a program?"""
    return any(os.access(os.path.join(folder, name), os.X_OK) for folder in os.get_exec_path())


def import_names(distribution: metadata.Distribution) -> list[str]:
    """Top-level packages and modules that the distribution's own file list names; none for one of libraries alone."""
    names = set()
    for file in distribution.files or ():
        first = file.parts[0]
        if len(file.parts) == 2 and file.parts[1] == "__init__.py":
            names.add(first)
        elif len(file.parts) == 1 and file.suffix in (".py", ".so"):
            names.add(first.split(".")[0])
    return sorted(name for name in names if name.isidentifier() and name not in APART and not name.startswith("__"))


def torch_cuda() -> str | None:
    """The CUDA that torch was built for, read without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    found = runpy.run_path(os.path.join(os.path.dirname(spec.origin), "version.py")).get("cuda")
    return str(found) if found else None


def imports(names: list[str]) -> None:
    """Import each, saying before and after."""
    for name in names:
        attempt(name, lambda name=name: importlib.import_module(name))


def native(asked: list[str]) -> None:
    """Load the shared libraries that each `package:glob` names."""
    for what in asked:
        attempt(what, lambda what=what: load(*what.split(":", 1)))


def load(package: str, pattern: str) -> None:
    """Load every library that matches; a LookupError where there is none."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"{package} is not installed")
    found = [path for folder in spec.submodule_search_locations for path in glob.glob(os.path.join(folder, pattern))]
    if not found:
        raise LookupError(f"{package} has no {pattern}")
    if importlib.util.find_spec("torch"):
        importlib.import_module("torch")  # its libraries are what many extensions are linked with
    for path in found:
        ctypes.CDLL(path)


def attempt(name: str, act: object) -> None:
    """Do it between two lines; whatever it raises is its answer, SystemExit included."""
    say({"try": name})
    began = time.monotonic()
    try:
        act()  # type: ignore[operator]
    except BaseException as error:
        line = traceback.format_exception_only(error)[-1].strip().partition("\n")[0]  # some go on with advice
        say({"name": name, "ok": False, "error": line[:500], "seconds": time.monotonic() - began})
    else:
        say({"name": name, "ok": True, "seconds": time.monotonic() - began})


OUT = os.dup(1)
"""Our own standard output: what libraries print on importing goes to standard error."""


def say(value: object) -> None:
    """One JSON line."""
    os.write(OUT, (json.dumps(value) + "\n").encode())


if __name__ == "__main__":
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    if sys.argv[1] == "installed":
        say(installed())
    else:
        {"imports": imports, "native": native}[sys.argv[1]](sys.argv[2:])
        os._exit(0)
