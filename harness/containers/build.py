"""`harness build`: an environment's image through the Engine's API, from locks and wheels alone."""

from __future__ import annotations

import datetime
import hashlib
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from harness import catalog
from harness.containers import context, engine, imagelock, probe, requirements, wheelhouse
from harness.containers.context import Sources
from harness.containers.imagelock import CHECKOUT, Base, Image, Variant
from harness.errors import HarnessError
from harness.schema import EnvironmentName, Frozen
from harness.scrub import plain

if TYPE_CHECKING:
    from docker import DockerClient

__all__ = ["CHECKOUT", "Built", "Request", "build", "requests"]

Say = Callable[[str], None]

BUILD_TIMEOUT_S = 6 * 3600
"""Without a word from the Engine: compiling kernels for three architectures says nothing for minutes."""
ARCHITECTURES = ("8.0", "9.0", "10.0")
BASE_LIST = Path("images/base/packages.lock")
_BASE_DIGEST = re.compile(r"^(base|build) (sha256:[0-9a-f]{64})$", re.MULTILINE)
_NAMED = re.compile(r"^(?P<name>[^\s@]+)@(?P<digest>sha256:[0-9a-f]{64})$")
_ARCHITECTURE = re.compile(r"^\d{1,2}\.\d$")


class Request(Frozen):
    """What to build."""

    environment: EnvironmentName
    variant: Variant
    architectures: tuple[str, ...] = ARCHITECTURES
    """CUDA compute capabilities; a CPU image has none."""
    base: str | None = None
    """NAME@sha256:... of another base than that of images.lock."""
    jobs: int = 2
    """Compilers at once; no part of what comes out."""


class Built(Frozen):
    """What `build` leaves."""

    name: str
    image: Image
    unchanged: bool
    """The image stood already, made of the same."""
    seconds: float


class Bases(Frozen):
    """What the image stands on: as the Engine finds it, and by digest."""

    base: str
    digest: str
    build_base: str


def requests(
    environment: str | None, variant: str, architectures: Sequence[str] | None, base: str | None, jobs: int
) -> tuple[Request, ...]:
    """What the words of a command line ask for; HarnessError for a word that is none."""
    for word, known in ((environment or "train", get_args(EnvironmentName)), (variant, get_args(Variant))):
        if word not in known:
            raise HarnessError(f"{word!r} is none of {', '.join(known)}{catalog.nearest(word, known)}")
    names: tuple[EnvironmentName, ...] = get_args(EnvironmentName)
    chosen = [name for name in names if environment in (None, name)]
    archs = tuple(architectures) if architectures else ARCHITECTURES
    kind: Variant = "cuda" if variant == "cuda" else "cpu"
    return tuple(Request(environment=name, variant=kind, architectures=archs, base=base, jobs=jobs) for name in chosen)


def build(request: Request, root: Path, say: Say, client: DockerClient | None = None) -> Built:
    """Build one image of the checkout at `root`, or find that it stands; `images.lock` names it afterwards."""
    began = datetime.datetime.now(datetime.UTC)
    _check(request)
    found = context.sources(root / "images", request.environment, request.variant)
    for lock in (found.lock, *found.build_locks):
        requirements.read(Path(lock))
    path, name = imagelock.path_of(root), imagelock.key(request.environment, request.variant)
    lock_file = imagelock.read(path)
    base = base_of(root)
    bases = _bases(request, base)
    recipe = _recipe(request, found, bases)
    client = client or engine.connect(BUILD_TIMEOUT_S)
    standing = _standing(lock_file.images.get(name), found, bases, recipe, client)
    image = standing or _build(request, root, found, bases, recipe, client, say)
    base = base_of(root)  # as it is now: a build may take an hour
    if standing is None or lock_file.base != base:
        imagelock.change(path, lambda lock: imagelock.with_image(imagelock.with_base(lock, base), name, image))
    seconds = (datetime.datetime.now(datetime.UTC) - began).total_seconds()
    return Built(name=name, image=image, unchanged=standing is not None, seconds=seconds)


def _check(request: Request) -> None:
    wrong = [arch for arch in request.architectures if not _ARCHITECTURE.match(arch)]
    if wrong:
        raise HarnessError(f"{wrong[0]!r} is no compute capability", "such as --arch 9.0 (an H100 or H200)")
    if request.base is not None and not _NAMED.match(request.base):
        raise HarnessError(
            f"the base {request.base!r} is not pinned: a tag may be another image tomorrow",
            "name it by digest: NAME@sha256:... (docker image inspect --format '{{.RepoDigests}}' NAME)",
        )


def base_of(root: Path) -> Base:
    """The base that the checkout's list of Debian packages makes; HarnessError where there is no such list."""
    path = root / BASE_LIST
    digests = dict(_BASE_DIGEST.findall(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    if set(digests) != {"base", "build"}:
        raise HarnessError(f"{path} names no base images", "make them with tools/base --refresh")
    packages = requirements.digest(path).removeprefix("sha256:")
    return Base(digest=digests["base"], source="tools/base", packages_sha256=packages, build_digest=digests["build"])


def _bases(request: Request, base: Base) -> Bases:
    """What to stand on; the builder stage always stands on ours."""
    named = _NAMED.match(request.base or "")
    build_base = base.build_digest or base.digest
    if named is None:
        return Bases(base=base.digest, digest=base.digest, build_base=build_base)
    return Bases(base=named[0], digest=named["digest"], build_base=build_base)


def _recipe(request: Request, found: Sources, bases: Bases) -> str:
    """Of all that decides what comes out, but base and requirements, which have digests of their own."""
    arch = request.architectures if request.variant == "cuda" else ()
    parts = [found.digest, bases.build_base, request.environment, request.variant, *arch]
    return f"sha256:{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()}"


def _standing(image: Image | None, found: Sources, bases: Bases, recipe: str, client: DockerClient) -> Image | None:
    """`image` where it was made of just that and the Engine has it."""
    if image is None:
        return None
    asked = (requirements.digest(Path(found.lock)), bases.digest, recipe)
    same = (image.lock, image.base, image.recipe) == asked
    return image if same and engine.inspect(client, image.image) else None


def _build(
    request: Request, root: Path, found: Sources, bases: Bases, recipe: str, client: DockerClient, say: Say
) -> Image:
    _have_bases(client, bases, root, say)
    locks = [Path(lock) for lock in (found.lock, *found.build_locks)]
    houses = tuple(wheelhouse.gather(lock, root / ".wheels", say) for lock in locks)
    lock_digest, revision = requirements.digest(locks[0]), revision_of(root)
    arguments = {
        "BASE": bases.base,
        "BUILD_BASE": bases.build_base,
        "BASE_DIGEST": bases.digest,
        "VARIANT": request.variant,
        "ARCH": " ".join(request.architectures) if request.variant == "cuda" else "",
        "MAX_JOBS": str(request.jobs),
        "LOCK_SHA256": lock_digest.removeprefix("sha256:"),
        "REVISION": revision,
    }
    tag = f"harness-{request.environment}:{request.variant}"
    with context.stream(found, houses, _epoch(root)) as tar:
        image_id = _ask(client, tar, arguments, tag, say)
    inside = probe.ask(client, image_id)
    size = (engine.inspect(client, image_id) or {}).get("Size", 0)
    return Image(
        image=image_id,
        base=bases.digest,
        lock=lock_digest,
        built=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        source_revision=revision,
        versions={"python": inside.python} | inside.libraries,
        cuda=inside.cuda,
        oldest_driver=catalog.oldest_driver(inside.cuda),
        size_bytes=size,
        recipe=recipe,
        architectures=request.architectures if request.variant == "cuda" else (),
    )


def _have_bases(client: DockerClient, bases: Bases, root: Path, say: Say) -> None:
    """Every base is in the Engine: one named with a registry is pulled by its digest, ours are made by tools/base."""
    if "@" in bases.base and engine.inspect(client, bases.base) is None:
        say(f"pulling {bases.base}")
        name, _, digest = bases.base.partition("@")
        with engine.refusals(f"{bases.base} cannot be pulled", "pull or load it yourself, or leave --base out"):
            client.images.pull(name, tag=digest)
    ours = {image for image in (bases.base, bases.build_base) if "@" not in image}
    if all(engine.inspect(client, image) for image in ours):
        return
    say("tools/base: making the base images")
    ended = subprocess.run([root / "tools/base"], capture_output=True, text=True)
    missing = [image for image in ours if engine.inspect(client, image) is None]
    if ended.returncode or missing:
        why = ended.stderr.strip() or f"the Engine still has no {' and no '.join(missing)}"
        raise HarnessError("tools/base did not make the base images", why)


def _ask(client: DockerClient, tar: Any, arguments: dict[str, str], tag: str, say: Say) -> str:
    """Let the Engine build; the image's id."""
    image_id = ""
    said: list[str] = []
    with engine.refusals("the Engine refused the build"):
        lines = client.api.build(
            fileobj=tar, custom_context=True, dockerfile="Containerfile", buildargs=arguments, tag=tag, rm=True,
            forcerm=True, network_mode="none", decode=True,
        )  # fmt: skip
        for line in lines:
            if "error" in line:
                tail = "\n  ".join(said[-20:])
                raise HarnessError(f"the build of {tag} failed: {line['error'].strip()}", tail)
            image_id = line.get("aux", {}).get("ID", image_id)
            for text in plain(str(line.get("stream", ""))).splitlines():
                if text.strip():
                    said.append(text.rstrip())
                    say(text.rstrip())
    if not image_id:
        raise HarnessError(f"the Engine named no image after the build of {tag}", "\n  ".join(said[-20:]))
    return image_id


def revision_of(root: Path) -> str:
    """The checkout's commit, `-dirty` behind it where tracked files of the images differ from it."""
    commit = _git(root, "rev-parse", "HEAD") or "unknown"
    return f"{commit}-dirty" if _git(root, "status", "--porcelain", "--", "images", ":!images/images.lock") else commit


def _epoch(root: Path) -> int:
    """The time that every file of the context bears: that of the last commit which changed an image's sources."""
    return int(_git(root, "log", "-1", "--format=%ct", "--", "images", ":!images/images.lock") or 0)


def _git(root: Path, *arguments: str) -> str:
    try:
        answer = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
