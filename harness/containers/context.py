"""What a build reads: the Containerfile of an environment, its locks, their wheels; as one stream, copied nowhere.

Containerfile      images/<environment>/Containerfile
requirements.txt   images/<environment>/<variant>.txt
tools.txt          images/build/tools.txt
build.txt          images/<environment>/build-<variant>.txt, empty where there is none
build/             images/build/
parsers/ and what else lies in images/<environment>/, other environments' and variants' locks left out
wheels/            every file that the three locks need on the images' platform
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from harness.containers import wheelhouse
from harness.containers.imagelock import Variant
from harness.containers.wheelhouse import Wheelhouse
from harness.errors import HarnessError
from harness.schema import EnvironmentName, Frozen

NOT_SHIPPED = (".in", ".txt", ".override", ".pyc")
"""Locks and what they are made from: the context has the one lock of its variant."""


class Sources(Frozen):
    """The small files of a build by name inside the context; wheels come later."""

    files: dict[str, bytes]
    executable: frozenset[str]
    lock: str
    """Path of the environment's requirements."""
    build_locks: tuple[str, ...]
    """Paths of what only the builder stage installs."""

    @property
    def digest(self) -> str:
        """Over every file but the requirements, which have a digest of their own."""
        found = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            if name != "requirements.txt":
                found.update(f"{name}\0{name in self.executable}\0{hashlib.sha256(content).hexdigest()}\n".encode())
        return found.hexdigest()


def sources(images: Path, environment: EnvironmentName, variant: Variant) -> Sources:
    """What lies in the checkout's `images` folder for one image; HarnessError where a needed file is not there."""
    folder = images / environment
    lock = folder / f"{variant}.txt"
    for needed in (folder / "Containerfile", lock):
        if not needed.is_file():
            raise HarnessError(f"there is no {needed}", "run this in a checkout of harness (or --root CHECKOUT)")
    build_locks = [path for path in (images / "build/tools.txt", folder / f"build-{variant}.txt") if path.is_file()]
    chosen = {"requirements.txt": lock, "tools.txt": images / "build/tools.txt",
              "build.txt": folder / f"build-{variant}.txt"}  # fmt: skip
    files = {name: path.read_bytes() if path.is_file() else b"" for name, path in chosen.items()}
    executable = set()
    for name, path in (*_tree(folder, ""), *_tree(images / "build", "build/")):
        files[name] = path.read_bytes()
        if os.access(path, os.X_OK):
            executable.add(name)
    return Sources(files=files, executable=frozenset(executable), lock=str(lock),
                   build_locks=tuple(map(str, build_locks)))  # fmt: skip


def _tree(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """The files below `folder` that a context takes, and their names in it."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in NOT_SHIPPED and "__pycache__" not in path.parts:
            yield prefix + path.relative_to(folder).as_posix(), path


@contextmanager
def stream(found: Sources, houses: tuple[Wheelhouse, ...], epoch_s: int) -> Iterator[IO[bytes]]:
    """The context as a tar that is made while it is read; every file of it has the time `epoch_s`.

    A wheel whose bytes are not its sha256 ends the stream, and leaving the block raises the HarnessError naming it.
    """
    end, begin = os.pipe()
    failed: list[BaseException] = []
    writer = threading.Thread(target=_write, args=(begin, found, houses, epoch_s, failed), daemon=True)
    with os.fdopen(end, "rb") as readable:
        writer.start()
        try:
            yield readable
        except BaseException:
            if failed and isinstance(failed[0], HarnessError):
                raise failed[0] from None
            raise
    writer.join()
    if failed:
        raise failed[0]


def _write(
    descriptor: int, found: Sources, houses: tuple[Wheelhouse, ...], epoch_s: int, failed: list[BaseException]
) -> None:
    try:
        with os.fdopen(descriptor, "wb") as out, tarfile.open(fileobj=out, mode="w|") as tar:
            for name, content in sorted(found.files.items()):
                mode = 0o755 if name in found.executable else 0o644
                _add(tar, name, io.BytesIO(content), len(content), mode, epoch_s)
            for name, path in _wheels(houses):
                with path.open("rb") as wheel:
                    _add(tar, f"wheels/{name}", wheel, path.stat().st_size, 0o644, epoch_s)
    except BrokenPipeError:
        pass  # The Engine has stopped reading, and says itself why.
    except BaseException as problem:
        failed.append(problem)


def _add(tar: tarfile.TarFile, name: str, content: IO[bytes], size: int, mode: int, epoch_s: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, mode, epoch_s
    tar.addfile(entry, content)


def _wheels(houses: tuple[Wheelhouse, ...]) -> Iterator[tuple[str, Path]]:
    """Each file once, checked: what lies on a disk for months is not taken on trust."""
    seen: set[str] = set()
    for house in houses:
        for file in house.files:
            if file.file_name in seen:
                continue
            seen.add(file.file_name)
            path = house.path(file)
            if wheelhouse.sha256_of(path) != file.sha256:
                raise HarnessError(f"{file.name} {file.version}: {path} is not what the lock names",
                                   "remove that file; the next build fetches it again")  # fmt: skip
            yield file.file_name, path
