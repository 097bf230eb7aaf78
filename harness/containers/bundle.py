"""`harness build --bundle`: all that a host without network and without an Engine needs, in one folder.

install.py               makes all that follows usable: python3 install.py
bundle.json              what this is: environments, revision, the sha256 of every file of wheels/
wheels/  locks/          as the locks name them
images/<name>.tar        instead of wheels where a lock has sources that only a compiler can install
harness/  images/  matrices/  README.md    the program
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.containers import engine, imagelock, wheelhouse
from harness.containers.build import Request, revision_of
from harness.containers.wheelhouse import Say, Wheelhouse
from harness.errors import HarnessError
from harness.files import write_atomically
from harness.schema import Frozen

if TYPE_CHECKING:
    from docker import DockerClient

CODE = ("harness", "images", "matrices", "README.md", "LICENSE")
"""Of the checkout: the program, and the locks that its environments are held against."""
CONTROL_PLANE, UV = Path("tools/requirements/harness.txt"), Path("tools/requirements/uv.txt")
EXPORT_TIMEOUT_S = 3600
"""Without a word from the Engine: it packs the whole image before it sends the first byte."""
INSTALLER = Path(__file__).with_name("install.py")


class Bundle(Frozen):
    """What was written."""

    folder: str
    environments: tuple[str, ...]
    """Those that are installed from wheels."""
    images: tuple[str, ...]
    """Those that come as an exported image."""
    files: int
    size_bytes: int


def bundle(requests: Sequence[Request], root: Path, to: Path, say: Say, client: DockerClient | None = None) -> Bundle:
    """Write the bundle of these environments to `to`, a folder that is new, empty or a bundle."""
    _check(to)
    names = {imagelock.key(one.environment, one.variant): one for one in requests}
    locks = {name: root / "images" / one.environment / f"{one.variant}.txt" for name, one in names.items()}
    locks["harness"] = root / CONTROL_PLANE
    houses = {name: wheelhouse.gather(lock, root / ".wheels", say) for name, lock in locks.items()}
    sources = {name for name, house in houses.items() if any(not f.file_name.endswith(".whl") for f in house.files)}
    uv_house = wheelhouse.gather(root / UV, root / ".wheels", say)
    (uv,) = uv_house.files
    for name in sorted(sources):
        _export(name, root, to / "images" / f"{name}.tar", say, client)
    chosen = {name: house for name, house in houses.items() if name not in sources}
    files = _lay_wheels([*chosen.values(), uv_house], to / "wheels")
    for name in chosen:
        _copy(locks[name], to / "locks" / f"{name}.txt")
    for part in CODE:
        if (root / part).exists():
            _copy(root / part, to / part)
    _copy(INSTALLER, to / "install.py")
    places = [_place(name, names.get(name)) for name in sorted(chosen)]
    content: dict[str, Any] = {
        "version": 1, "python": wheelhouse.PYTHON, "revision": revision_of(root), "places": places,
        "images": sorted(sources), "uv": {"file_name": uv.file_name, "sha256": uv.sha256}, "files": files,
    }  # fmt: skip
    write_atomically(to / "bundle.json", json.dumps(content, indent=1) + "\n")
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    environments = tuple(sorted(set(chosen) - {"harness"}))
    return Bundle(folder=str(to), environments=environments, images=tuple(sorted(sources)), files=len(files),
                  size_bytes=size)  # fmt: skip


def _check(to: Path) -> None:
    if to.exists() and any(to.iterdir()) and not (to / "bundle.json").is_file():
        raise HarnessError(f"{to} is no empty folder", "name a new one for the bundle")
    to.mkdir(parents=True, exist_ok=True)


def _place(name: str, request: Request | None) -> dict[str, str]:
    """Where an environment is installed, inside the bundle."""
    folder = f".envs/{request.environment}" if request else ".venv"
    return {"name": name, "folder": folder, "lock": f"locks/{name}.txt"}


def _lay_wheels(houses: Sequence[Wheelhouse], to: Path) -> dict[str, str]:
    """Every file once, checked; linked where the disk is the same. Their sha256 by name."""
    to.mkdir(parents=True, exist_ok=True)
    found: dict[str, str] = {}
    for house in houses:
        for file in house.files:
            source, target = house.path(file), to / file.file_name
            if wheelhouse.sha256_of(source) != file.sha256:
                raise HarnessError(f"{file.name} {file.version}: {source} is not what the lock names",
                                   "remove that file; the next call fetches it again")  # fmt: skip
            found[file.file_name] = file.sha256
            if not target.exists() or wheelhouse.sha256_of(target) != file.sha256:
                _link(source, target)
    return dict(sorted(found.items()))


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copyfile(source, target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored)
    else:
        shutil.copyfile(source, target)


def _export(name: str, root: Path, target: Path, say: Say, client: DockerClient | None) -> None:
    """The built image as a file for `docker load` or apptainer's docker-archive."""
    locked = imagelock.read(imagelock.path_of(root)).images.get(name)
    client = client or engine.connect(EXPORT_TIMEOUT_S)
    if locked is None or engine.inspect(client, locked.image) is None:
        environment, variant = name.split("-")
        raise HarnessError(
            f"the lock of {name} has sources, which an offline host cannot compile, and its image is not built",
            f"first `harness build {environment} --variant {variant}`: the bundle then has the image",
        )
    say(f"{name}: exporting {locked.image}")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    try:
        with engine.refusals(f"{name} cannot be exported"), part.open("wb") as out:
            for chunk in client.images.get(locked.image).save():
                out.write(chunk)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
