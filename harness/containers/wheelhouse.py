"""The files of a hash-locked requirements file: found by uv, fetched once, checked by sha256, and kept.

    .wheels/files/<sha256>/<file name>     every file once, whichever locks name it
    .wheels/<sha256 of a lock>.json        which files that lock needs on the image's platform

What is here is not fetched again, and where all is here nothing asks the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import ssl
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from harness.containers import requirements
from harness.containers.installers import pip_settings, uv_program
from harness.containers.requirements import Requirement
from harness.errors import HarnessError
from harness.files import write_atomically
from harness.schema import Frozen

PLATFORM = "x86_64-manylinux_2_36"
PYTHON = "3.11"
"""Of the images: Debian 12 has glibc 2.36 and Python 3.11."""
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's own index of CPU wheels: a package index's `torch` for Linux is the CUDA build."""
UV = ("-q", "--no-deps", "--no-header", "--format", "pylock.toml",
      "--python-platform", PLATFORM, "--python-version", PYTHON)  # fmt: skip
AT_ONCE = 4
TRIES = 3
SAY_EVERY_S = 2
CHUNK_BYTES = 1 << 20
GB = 10**9

Say = Callable[[str], None]


class File(Frozen):
    """One distribution file that a lock needs."""

    name: str
    version: str
    file_name: str
    sha256: str
    url: str
    size_bytes: int | None = None


class Wheelhouse(Frozen):
    """The files of one lock, all of them here."""

    lock: str
    files: tuple[File, ...]
    folder: str

    def path(self, file: File) -> Path:
        """Where a file lies."""
        return Path(self.folder) / "files" / file.sha256 / file.file_name


def gather(lock: Path, cache: Path, say: Say) -> Wheelhouse:
    """Every file that `lock` needs, fetched into `cache` where it is not there yet.

    HarnessError naming the package whose file is not what the lock says, or saying that no index answers.
    """
    wanted = requirements.read(lock)
    digest = requirements.digest(lock)
    files = _known(cache, digest) or _resolved(lock, wanted)
    house = Wheelhouse(lock=digest, files=files, folder=str(cache))
    _fetch_missing(house, say)
    _remember(cache, house)
    return house


def _manifest(cache: Path, digest: str) -> Path:
    return cache / f"{digest.removeprefix('sha256:')}.json"


def _known(cache: Path, digest: str) -> tuple[File, ...]:
    """What an earlier call found for the same lock; nothing where there was none or its note is broken."""
    try:
        entries = json.loads(_manifest(cache, digest).read_text(encoding="utf-8"))
        return tuple(File.model_validate(entry) for entry in entries)
    except (OSError, ValueError):
        return ()


def _remember(cache: Path, house: Wheelhouse) -> None:
    text = json.dumps([file.model_dump() for file in house.files], indent=1)
    write_atomically(_manifest(cache, house.lock), text + "\n")


def _resolved(lock: Path, wanted: Sequence[Requirement]) -> tuple[File, ...]:
    """The file of each entry that the image's platform wants; HarnessError where the lock has another hash."""
    by_name: dict[str, Requirement] = {entry.name: entry for entry in wanted}
    found = []
    for package in _packages(lock, wanted):
        entry = next((e for e in wanted if (e.name, e.version) == (package["name"], package["version"])), None)
        found.append(_choose(package, entry or by_name[package["name"]], lock))
    return tuple(found)


def _choose(package: dict[str, Any], entry: Requirement, lock: Path) -> File:
    """The wheel of `package` (its source archive where it has no wheel) whose hash the lock has."""
    offered = [_file(package, item) for item in package.get("wheels") or [package["sdist"]]]
    for file in offered:
        if file.sha256 in entry.hashes:
            return file
    first = offered[0]
    raise HarnessError(
        f"{lock}: no hash of {entry.name} {entry.version} is that of {first.file_name} (sha256:{first.sha256})",
        "the lock was changed by hand, or the index offers another file; tools/lock makes the lock anew",
    )


def _file(package: dict[str, Any], item: dict[str, Any]) -> File:
    url = item.get("url") or Path(item["path"]).absolute().as_uri()
    name = item.get("name") or unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    return File(name=package["name"], version=package["version"], file_name=name, sha256=item["hashes"]["sha256"],
                url=url, size_bytes=item.get("size"))  # fmt: skip


def _packages(lock: Path, wanted: Iterable[Requirement]) -> list[dict[str, Any]]:
    """uv's answer for the lock on the image's platform, one mapping a package (PEP 751)."""
    settings = pip_settings()
    links = [f"--find-links={where}" for where in settings.get("find-links", "").split()]
    cpu_torch = [f"{e.name}=={e.version}" for e in wanted if e.name == "torch" and e.version.endswith("+cpu")]
    if cpu_torch and not links:
        # An index of its own for torch alone: with both, uv would look for every other package there too.
        rest = [f"{e.name}=={e.version}{f' ; {e.marker}' if e.marker else ''}" for e in wanted if e.name != "torch"]
        return [*_ask_uv(rest, [], lock), *_ask_uv(cpu_torch, [f"--default-index={TORCH_INDEX}"], lock)]
    lines = [f"{e.name}=={e.version}{f' ; {e.marker}' if e.marker else ''}" for e in wanted]
    cuda_torch = any(e.name == "torch" for e in wanted) and not cpu_torch
    return _ask_uv(lines, [] if cuda_torch else links, lock)  # 2.13.0+cpu there would pass for 2.13.0


def _ask_uv(lines: Sequence[str], options: Sequence[str], lock: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        given, answer = Path(scratch, "given.in"), Path(scratch, "pylock.toml")
        given.write_text("\n".join(lines) + "\n", encoding="utf-8")
        argv = [uv_program(), "pip", "compile", *UV, *options, "-o", str(answer), str(given)]
        ended = subprocess.run(argv, capture_output=True, text=True, env=_uv_environment())
        if ended.returncode:
            why = "\n  ".join((ended.stderr + ended.stdout).strip().splitlines()[-8:])
            raise HarnessError(f"uv does not find the files of {lock}", f"{why}\n  Is the package index reachable?")
        content = tomllib.loads(answer.read_text(encoding="utf-8"))
    packages: list[dict[str, Any]] = content.get("packages", [])
    return packages


def _uv_environment() -> dict[str, str]:
    settings = pip_settings()
    env = {**os.environ, "UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"}
    if "index-url" in settings:
        env.setdefault("UV_DEFAULT_INDEX", settings["index-url"])
    if "cert" in settings:
        env.setdefault("SSL_CERT_FILE", settings["cert"])
    return env


def _fetch_missing(house: Wheelhouse, say: Say) -> None:
    missing = [file for file in house.files if not house.path(file).is_file()]
    if not missing:
        return
    folder = Path(house.folder)
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(file.size_bytes or 0 for file in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise HarnessError(f"{needed / GB:.1f} GB of wheels are missing, {free / GB:.1f} GB are free at {folder}",
                           "free some disk space")  # fmt: skip
    say(f"wheels: fetching {len(missing)} of {len(house.files)} files, {needed / GB:.2f} GB")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        told = time.monotonic()
        for done, file in enumerate(pool.map(lambda file: _fetch(file, house.path(file)), missing), 1):
            if time.monotonic() - told > SAY_EVERY_S or done == len(missing):
                told = time.monotonic()
                say(f"wheels: {done} of {len(missing)}: {file.file_name}")


def _fetch(file: File, target: Path) -> File:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{os.getpid()}.part")
    try:
        digest = _copied(file, part) if file.url.startswith("file:") else _downloaded(file, part)
        if digest != file.sha256:
            raise HarnessError(
                f"{file.name} {file.version}: {file.file_name} has sha256 {digest}, the lock says {file.sha256}",
                "what was fetched is not what the lock names: look at the mirror or proxy in use",
            )
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return file


def _copied(file: File, part: Path) -> str:
    source = Path(unquote(urlsplit(file.url).path))
    try:
        shutil.copyfile(source, part)
    except OSError as problem:
        raise HarnessError(f"{file.name}: {source} cannot be read: {problem.strerror}") from None
    return sha256_of(part)


def sha256_of(path: Path) -> str:
    """In hex."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _downloaded(file: File, part: Path) -> str:
    """Fetch over HTTP, several times where the connection breaks; the sha256 of what came."""
    import httpx

    for left in reversed(range(TRIES)):
        try:
            return _stream(file.url, part)
        except httpx.HTTPError as problem:
            if not left:
                raise HarnessError(
                    f"{file.name} {file.version} could not be fetched: {problem or type(problem).__name__}",
                    "look at the network and the proxy (HTTPS_PROXY); what was fetched is kept",
                ) from None
            time.sleep(1 + TRIES - left)
    raise AssertionError("unreachable")


def _stream(url: str, part: Path) -> str:
    import httpx

    digest = hashlib.sha256()
    cert = os.environ.get("SSL_CERT_FILE") or pip_settings().get("cert")
    verify: ssl.SSLContext | bool = ssl.create_default_context(cafile=cert) if cert else True
    with httpx.stream("GET", url, follow_redirects=True, timeout=60, verify=verify) as answer, part.open("wb") as out:
        answer.raise_for_status()
        for chunk in answer.iter_bytes(CHUNK_BYTES):
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()
