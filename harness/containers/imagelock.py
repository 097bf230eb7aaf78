"""`images/images.lock`: which images stand for the pinned environments, and what each was made of.

Written by `harness build`, read by whoever starts an image. An image is known by its id (`sha256:...`), never by a tag.
"""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

import harness
from harness.errors import HarnessError
from harness.files import write_atomically
from harness.schema import EnvironmentName, Frozen

VERSION = 1
FILE_NAME = "images.lock"
CHECKOUT = Path(harness.__file__).resolve().parent.parent

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Variant = Literal["cpu", "cuda"]


class Base(Frozen):
    """The image that all others begin with."""

    digest: Digest
    """Its image id."""
    source: str
    """What made it: `tools/base`, or the NAME@sha256:... that a user gave."""
    packages_sha256: str | None = None
    """Of the list of its packages, where `tools/base` made it."""
    build_digest: Digest | None = None
    """Image id of the same with a compiler, for builder stages."""


class Image(Frozen):
    """One built image."""

    image: Digest
    """The image id."""
    base: Digest
    lock: Digest
    """Of the hash-locked requirements."""
    built: str
    """ISO 8601, UTC."""
    source_revision: str
    """The checkout's commit, `-dirty` behind it where files differed."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of what matters for a number, as the image itself says."""
    cuda: str | None = None
    """`None` for a CPU image."""
    oldest_driver: str | None = None
    """The oldest NVIDIA driver that can run it."""
    size_bytes: int
    recipe: Digest | None = None
    """Of everything that the build reads but the base and the requirements: Containerfile and its other files, build
    arguments. An equal recipe, base and lock make no new build."""
    architectures: tuple[str, ...] = ()
    """Compute capabilities that kernels were compiled for."""


class ImageLock(Frozen):
    """The whole file."""

    version: int = VERSION
    base: Base | None = None
    images: dict[str, Image] = Field(default_factory=dict)
    """By `<train|serve>-<cpu|cuda>`."""

    def image(self, environment: EnvironmentName, variant: Variant) -> Image:
        """The image of an environment; HarnessError saying how to build it where there is none."""
        name = key(environment, variant)
        if name not in self.images:
            missing = f"there is no {name} image in images/{FILE_NAME}"
            raise HarnessError(missing, f"build it with `harness build {environment} --variant {variant}`")
        return self.images[name]


def key(environment: EnvironmentName, variant: Variant) -> str:
    """The name of an image in the file."""
    return f"{environment}-{variant}"


def path_of(root: Path | None = None) -> Path:
    """Where the file of the checkout at `root` lies (default: this one)."""
    return (root or CHECKOUT) / "images" / FILE_NAME


def read(path: Path) -> ImageLock:
    """The file's content, empty where there is none; HarnessError where it is broken or newer than this program."""
    if not path.exists():
        return ImageLock()
    try:
        content: Any = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) or {}
        if isinstance(content, dict) and isinstance(content.get("version"), int) and content["version"] > VERSION:
            newer = f"{path}: written in version {content['version']}; this harness reads up to {VERSION}"
            raise HarnessError(newer, "upgrade harness to read it")
        return ImageLock.model_validate(content)
    except ValidationError as problem:
        first = problem.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, UnicodeDecodeError, YAMLError) as problem:
        why = str(problem).splitlines()[0]
    raise HarnessError(f"{path} is no lock of images ({why})", "restore it, or remove it and build the images again")


def write(path: Path, lock: ImageLock) -> None:
    """Replace the file's content, whole."""
    text = io.StringIO()
    text.write("# Written by `harness build`. An image is known by its id; a tag says nothing.\n")
    content = lock.model_dump(mode="json")
    content["images"] = dict(sorted(content["images"].items()))
    writer = YAML()
    writer.width = 200
    writer.dump(content, text)
    write_atomically(path, text.getvalue())


def change(path: Path, to: Callable[[ImageLock], ImageLock]) -> ImageLock:
    """Read, change and write as one step, so that two builds at once lose nothing; what stands afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        changed = to(read(path))
        write(path, changed)
    finally:
        os.close(folder)
    return changed


def with_image(lock: ImageLock, name: str, image: Image) -> ImageLock:
    """`lock` with `image` as `name`."""
    return lock.model_copy(update={"images": {**lock.images, name: image}})


def with_base(lock: ImageLock, base: Base) -> ImageLock:
    """`lock` with another base; images made on the old one stay until they are built again."""
    return lock.model_copy(update={"base": base})
