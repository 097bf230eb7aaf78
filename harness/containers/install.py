"""Install this bundle where it lies, without a network: python3 install.py. Needs Python 3.11 on Linux x86-64, no pip.

    .envs/<environment>   the pinned environments (HARNESS_ENVS for a harness that lies elsewhere)
    .venv/bin/harness     the program itself

Every file is checked against the sha256 of its lock. A second call goes on where the first one stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
STAMP = "lock.stamp"

COMMAND = """\
#!/bin/sh
'''exec' "$(dirname "$(readlink -f "$0")")/python" -P "$0" "$@"
' '''
import os
import sys

os.environ.setdefault("HARNESS_COMMIT", {revision!r})
from harness.__main__ import main

sys.exit(main())
"""
"""For a shell the second line starts Python on this file; for Python it is a string."""


def main() -> int:
    """Install all that the bundle holds; the exit code."""
    bundle = json.loads((ROOT / "bundle.json").read_text(encoding="utf-8"))
    found = (f"{sys.version_info.major}.{sys.version_info.minor}", f"{platform.system()} {platform.machine()}")
    if found != (bundle["python"], "Linux x86_64"):
        return fail(f"this bundle is for Python {bundle['python']} on Linux x86_64, this is Python {found[0]} on "
                    f"{found[1]}", f"run it with python{bundle['python']}")  # fmt: skip
    uv = unpack_uv(bundle)
    if uv is None:
        return fail("the installer in this bundle is damaged", "copy the bundle again")
    for place in bundle["places"]:
        if code := install(uv, place):
            return code
    add_command(bundle["revision"])
    for name in bundle["images"]:
        print(f"{name}: no wheels can be installed without a compiler; load the image instead: images/{name}.tar")
    print(f"done: {ROOT}/.venv/bin/harness --help")
    return 0


def fail(what: str, next_step: str) -> int:
    """Say it on standard error."""
    print(f"install: {what}\n  Next: {next_step}", file=sys.stderr)
    return 2


def unpack_uv(bundle: dict[str, Any]) -> Path | None:
    """uv's program out of its wheel, which is checked first; None where it is not what the bundle says."""
    wheel, target = ROOT / "wheels" / bundle["uv"]["file_name"], ROOT / ".uv" / "uv"
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != bundle["uv"]["sha256"]:
        return None
    target.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/scripts/uv"))
        target.write_bytes(archive.read(name))
    target.chmod(0o755)
    return target


def install(uv: Path, place: dict[str, str]) -> int:
    """One environment from its lock, compiled to bytecode; 0, or the exit code of what failed."""
    folder, lock = ROOT / place["folder"], ROOT / place["lock"]
    stamp = f"{place['name']} {hashlib.sha256(lock.read_bytes()).hexdigest()}\n"
    if (folder / STAMP).is_file() and (folder / STAMP).read_text() == stamp:
        print(f"{place['name']}: is installed")
        return 0
    print(f"{place['name']}: installing into {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    env = {**os.environ, "UV_OFFLINE": "1", "UV_NO_CACHE": "1", "UV_PYTHON_DOWNLOADS": "never", "UV_NO_CONFIG": "1",
           "UV_LINK_MODE": "copy"}  # fmt: skip
    env.pop("VIRTUAL_ENV", None)
    base = str(getattr(sys, "_base_executable", sys.executable))
    commands = (
        ["venv", "-q", "--no-project", "--python", base, str(folder)],
        ["pip", "install", "-q", "--no-index", f"--find-links={ROOT / 'wheels'}", "--no-deps", "--require-hashes",
         "--compile-bytecode", "-p", str(folder / "bin/python"), "-r", str(lock)],
    )  # fmt: skip
    for arguments in commands:
        ended = subprocess.run([str(uv), *arguments], env=env, check=False)
        if ended.returncode:
            return fail(f"{place['name']} could not be installed", "read the lines above; copy the bundle again?")
    (folder / STAMP).write_text(stamp)
    return 0


def add_command(revision: str) -> None:
    """`harness` in the control plane's environment, on the code that lies here."""
    venv = ROOT / ".venv"
    site = next(venv.glob("lib/python3.*/site-packages"))
    (site / "harness-bundle.pth").write_text(os.path.relpath(ROOT, site) + "\n")
    command = venv / "bin" / "harness"
    command.write_text(COMMAND.format(revision=revision))
    command.chmod(0o755)


if __name__ == "__main__":
    sys.exit(main())
