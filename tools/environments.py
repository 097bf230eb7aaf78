"""Make and keep the virtual environments of this checkout; standard library only. Started by `tools/setup`.

Each environment holds exactly what its lock names, checked by hash, and a stamp with the lock's sha256 that is written
last: an installation that was cut off leaves no stamp and is done again.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
ENVS = ROOT / ".envs"
STAMP = "lock.stamp"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's own index of CPU wheels: a package index's `torch` for Linux is the CUDA build."""
GB = 10**9


class Place(NamedTuple):
    """An environment: where it lies, what it holds, what it takes on disk (bytes, measured, rounded up)."""

    directory: Path
    lock: Path
    disk_bytes: int


PLACES = {
    "uv": Place(ENVS / "uv", ROOT / "tools/requirements/uv.txt", GB // 10),
    "harness": Place(ROOT / ".venv", ROOT / "tools/requirements/harness.txt", GB // 2),
    "tests": Place(ROOT / ".venv", ROOT / "tools/requirements/tests.txt", 7 * GB // 10),
    "train": Place(ENVS / "train", ROOT / "images/train/cpu.txt", 13 * GB // 10),
    "serve": Place(ENVS / "serve", ROOT / "images/serve/cpu.txt", 34 * GB // 10),
}
STANDS_IN = {"harness": ("harness", "tests")}
"""Environments that hold all that another one would: the tests' has the control plane in it."""
OFFLINE = (
    *("dns error", "error sending request", "Failed to fetch", "Could not connect", "NewConnectionError"),
    *("timed out", "Connection refused", "unreachable", "No matching distribution", "in the package registry"),
)
ADVICE = (
    (("No space left",), "Free some disk space (all environments need about 5 GB) and run this again."),
    (
        ("hash mismatch", "Hash mismatch", "DO NOT MATCH"),
        "What was downloaded is not what the lock names: do not install it. Look at the mirror or proxy in use.",
    ),
    (
        OFFLINE,
        "No package index answered. Look at the network and the proxy (HTTPS_PROXY), or point pip at a mirror or a "
        "folder of wheels (pip config set global.index-url URL, global.find-links DIR) and run this again.",
    ),
)
"""The next step, by what a failed installation said."""


def fail(message: str, next_step: str) -> NoReturn:
    """Say what is wrong and the next step on standard error; exit 2."""
    print(f"setup: {message}\n  Next: {next_step}", file=sys.stderr)
    raise SystemExit(2)


def advice(output: str) -> str:
    """The next step for whoever sees a failed installation's `output`."""
    for signs, text in ADVICE:
        if any(sign in output for sign in signs):
            return text
    return "Read the lines above; remove .envs and .venv to begin from nothing."


def stamp_text(name: str) -> str:
    """What the stamp of an up-to-date environment says: name, sha256 of its lock, Python."""
    digest = hashlib.sha256(PLACES[name].lock.read_bytes()).hexdigest()
    return f"{name} sha256:{digest} python{sys.version_info.major}.{sys.version_info.minor}\n"


def is_ready(name: str) -> bool:
    """Was `name`, or one that stands in for it, installed to the end from the lock as it is now?"""
    directory = PLACES[name].directory
    try:
        stamp = (directory / STAMP).read_text()
    except OSError:
        return False
    return os.access(directory / "bin/python", os.X_OK) and any(
        stamp == stamp_text(other) for other in STANDS_IN.get(name, (name,))
    )


def check_machine(missing: Sequence[str]) -> None:
    """End with a message where `missing` cannot be installed here: another platform, or a disk too small."""
    machine = f"{platform.system()} {platform.machine()}"
    if machine != "Linux x86_64" and {"train", "serve"} & set(missing):
        fail(f"the CPU builds are locked for Linux x86_64, this is {machine}.", "use such a machine or container.")
    needed, free = sum(PLACES[name].disk_bytes for name in missing), shutil.disk_usage(ROOT).free
    if free < needed:
        fail(
            f"{', '.join(missing)} need about {needed / GB:.1f} GB at {ROOT}, {free / GB:.1f} GB are free.",
            f"free {(needed - free) / GB:.1f} GB more there, or clone to a larger disk.",
        )


def pip_settings() -> dict[str, str]:
    """What pip is configured with, by option; uv reads none of it. An environment variable wins over a file."""
    shown = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    settings: dict[str, str] = {}
    for line in sorted(shown.stdout.splitlines(), reverse=True):  # ":env:" sorts before "global" and "install"
        key, found, value = line.partition("=")
        if found:
            settings[key.rpartition(".")[2]] = str(ast.literal_eval(value))
    return settings


def uv_environment(settings: dict[str, str]) -> dict[str, str]:
    """The environment to run uv in: pip's index and certificate where uv has no own, and never another Python."""
    env = {**os.environ, "UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"}
    env.pop("VIRTUAL_ENV", None)
    if "index-url" in settings:
        env.setdefault("UV_DEFAULT_INDEX", settings["index-url"])
    if "cert" in settings:
        env.setdefault("SSL_CERT_FILE", settings["cert"])
    return env


def run(argv: Sequence[str | Path], env: dict[str, str] | None = None) -> str:
    """Run a command; its output where it failed, else nothing. It inherits the set-up lock: where this process is
    killed, the next set-up waits until the command, which lives on, has stopped writing."""
    ended = subprocess.run([str(part) for part in argv], env=env, capture_output=True, text=True, close_fds=False)
    return "" if ended.returncode == 0 else (ended.stderr + ended.stdout).strip() or f"exit code {ended.returncode}"


def must(argv: Sequence[str | Path], env: dict[str, str] | None = None) -> None:
    """Run a command; end with its last lines and the next step where it failed."""
    if output := run(argv, env):
        print("", *output.splitlines()[-15:], sep="\n    ", file=sys.stderr)
        fail(f"{Path(argv[0]).name} {argv[1]} failed.", advice(output))


def split_torch(lock: str) -> tuple[str, str]:
    """The lock's entry for torch, and all others."""
    torch: list[str] = []
    others: list[str] = []
    part = others
    for line in lock.splitlines(keepends=True):
        if line[:1].strip() and not line.startswith("#"):
            part = torch if line.startswith("torch==") else others
        part.append(line)
    return "".join(torch), "".join(others)


def install_uv(directory: Path, lock: Path) -> None:
    """uv itself, by pip: the one thing that a new machine's Python can install."""
    must([base_python(), "-m", "venv", "--clear", directory])
    must([directory / "bin/python", "-m", "pip", "install", "-q", "--require-hashes", "-r", lock])


def base_python() -> str:
    """The interpreter that environments are made from, not a virtual environment's."""
    return str(getattr(sys, "_base_executable", sys.executable))


def install_locked(directory: Path, lock: Path) -> None:
    """A fresh environment with what `lock` names and nothing else, compiled to bytecode.

    torch goes first and alone: a folder of wheels that pip knows, else PyTorch's own CPU index; one uv call with both
    that and a package index would look for every other package there too, or take the CUDA build.
    """
    settings = pip_settings()
    env = uv_environment(settings)
    uv = PLACES["uv"].directory / "bin/uv"
    links = [f"--find-links={where}" for where in settings.get("find-links", "").split()]
    must([uv, "venv", "-q", "--clear", "--no-project", "--python", base_python(), directory], env)
    install: list[str | Path] = [uv, "pip", "install", "-q", "--no-deps", "--require-hashes", "--compile-bytecode"]
    install += ["-p", directory / "bin/python"]
    torch, others = split_torch(lock.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        if torch:
            part = Path(scratch, "torch.txt")
            part.write_text(torch)
            if not links or run([*install, "--no-index", *links, "-r", part], env):
                must([*install, "--default-index", TORCH_INDEX, "-r", part], env)
        rest = Path(scratch, "others.txt")
        rest.write_text(others)
        must([*install, *links, "-r", rest], env)


COMMAND = """\
#!/bin/sh
'''exec' "$(dirname "$(readlink -f "$0")")/python" -P "$0" "$@"
' '''
import sys

from harness.__main__ import main

sys.exit(main())
"""
"""For a shell the second line starts Python on this file; for Python it is a string. -P: what lies beside the script or
in the current folder is no module."""


def add_command(directory: Path) -> None:
    """Put this checkout on the environment's path and `harness` into its bin: no build, nothing to download."""
    site = next(directory.glob("lib/python3.*/site-packages"))
    (site / "harness-checkout.pth").write_text(os.path.relpath(ROOT, site) + "\n")
    command = directory / "bin/harness"
    command.write_text(COMMAND)
    command.chmod(0o755)


def make(name: str) -> None:
    """Install one environment to the end, with a line that says how long it took."""
    directory, lock, _ = PLACES[name]
    print(f"setup: {name} from {lock.relative_to(ROOT)} ... ", end="", flush=True)
    began = time.monotonic()
    (directory / STAMP).unlink(missing_ok=True)
    if name == "uv":
        install_uv(directory, lock)
    else:
        install_locked(directory, lock)
    if directory == PLACES["harness"].directory:
        add_command(directory)
    (directory / STAMP).write_text(stamp_text(name))
    print(f"{time.monotonic() - began:.0f} s", flush=True)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the checkout's set-up lock: two set-ups at once would write into each other's environments."""
    ENVS.mkdir(exist_ok=True)
    with open(ENVS / "setup.lock", "w") as handle:
        os.set_inheritable(handle.fileno(), True)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("setup: waiting for another set-up of this checkout ...", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def wanted(arguments: Sequence[str]) -> list[str]:
    """The environments to look after, in the order of installation; ends where a name is none."""
    names = list(dict.fromkeys(arguments)) or ["harness", "train", "serve"]
    for name in names:
        if name not in PLACES:
            fail(f"there is no environment {name!r}.", f"choose from {', '.join(PLACES)}.")
    if "tests" in names and "harness" in names:
        names.remove("harness")
    return names


def main(arguments: Sequence[str]) -> None:
    """Bring every environment asked for up to its lock."""
    names = wanted(arguments)
    if all(is_ready(name) for name in names):
        return
    with alone():
        missing = [name for name in ["uv", *(name for name in names if name != "uv")] if not is_ready(name)]
        check_machine(missing)
        for name in missing:
            make(name)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run it again to go on.", file=sys.stderr)
        raise SystemExit(130) from None
