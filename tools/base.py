"""Make the base images from a list of Debian packages; standard library, apt, dpkg and mmdebstrap. See `tools/base`.

Two images: `base`, which the final images stand on, and `build`, the same with a compiler. Each is one layer, packed by
mmdebstrap with every time stamp at the list's epoch, under a configuration whose bytes depend on the list alone: so the
image id, which is the configuration's sha256, is the digest of the whole.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "images/base/packages.lock"
SUITE = "bookworm"
ARCHIVES = {SUITE: "debian", f"{SUITE}-updates": "debian", f"{SUITE}-security": "debian-security"}
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
WANTED = {
    # What wheels of torch and vLLM link with and Debian's essential packages lack, certificates, and NCCL's InfiniBand.
    "base": (
        "usr-is-merged",
        "python3.11",
        "ca-certificates",
        "libgomp1",
        "libstdc++6",
        "libnuma1",
        "libibverbs1",
        "ibverbs-providers",
        "librdmacm1",
    ),
    "build": ("python3.11-venv", "python3.11-dev", "gcc", "g++"),
}
"""What each image holds beside Debian's essential packages; `build` holds all of `base` too."""
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
MERGED = "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"
"""Debian 12 has /bin, /sbin and /lib as links into /usr; mmdebstrap makes them where it knows the suite by name."""
LEFT_IN = ("/usr/share/doc/*/copyright",)


class Package(NamedTuple):
    """A package file, and the image that it comes in with."""

    image: str
    name: str
    version: str
    sha256: str
    path: str
    """Below the mirror's root."""


class Listed(NamedTuple):
    """The list's content."""

    epoch: int
    """Seconds since 1970: when Debian last published what it was made from."""
    digests: dict[str, str]
    packages: tuple[Package, ...]

    def of(self, image: str) -> list[Package]:
        """The packages of an image."""
        return [package for package in self.packages if image == "build" or package.image == "base"]


def fail(message: str, next_step: str) -> NoReturn:
    """Say what is wrong and the next step on standard error; exit 2."""
    print(f"base: {message}\n  Next: {next_step}", file=sys.stderr)
    raise SystemExit(2)


def parse(text: str) -> Listed:
    """The list as `listing` writes it."""
    head: dict[str, str] = {}
    packages = []
    for line in text.splitlines():
        words = line.split()
        if line.startswith("#") or not words:
            continue
        if len(words) == len(Package._fields):
            packages.append(Package(*words))
        else:
            head[words[0]] = words[1]
    epoch = int(head.pop("epoch"))
    return Listed(epoch, head, tuple(packages))


def listing(listed: Listed) -> str:
    """The list as text: epoch, digests of what it makes, and a line for each package."""
    lines = [
        f"# Packages of the base images (Debian {SUITE}, amd64), written by `tools/base --refresh`.",
        f"epoch {listed.epoch}",
        *(f"{image} {digest}" for image, digest in listed.digests.items()),
        "# image, package, version, sha256, path below the mirror",
        *(" ".join(package) for package in sorted(listed.packages)),
    ]
    return "\n".join(lines) + "\n"


def run(argv: Sequence[str | Path], env: dict[str, str] | None = None) -> str:
    """A command's output; ends with its last lines where it failed."""
    ended = subprocess.run([str(part) for part in argv], env=env, capture_output=True, text=True, check=False)
    if ended.returncode:
        print(*ended.stderr.strip().splitlines()[-15:], sep="\n", file=sys.stderr)
        fail(f"{Path(argv[0]).name} failed with exit code {ended.returncode}.", "read the lines above.")
    return ended.stdout


def mirror_of_host() -> str:
    """The root of Debian's mirror: $HARNESS_DEBIAN_MIRROR, or the one that this host's apt uses."""
    if named := os.environ.get("HARNESS_DEBIAN_MIRROR"):
        return named.rstrip("/")
    asked = ("apt-get", "indextargets", "--format", "$(REPO_URI)")
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    for address in said.split():
        if address.startswith("http") and address.rstrip("/").endswith("/debian"):
            return address.rstrip("/").removesuffix("/debian")
    fail("apt of this host knows no mirror of Debian.", "name one: HARNESS_DEBIAN_MIRROR=http://MIRROR tools/base")


def apt_settings(folder: Path, mirror: str) -> Path:
    """An apt of its own in `folder`: nothing installed, Debian's three archives; its configuration file."""
    for name in ("state/lists/partial", "cache/archives/partial", "etc/preferences.d", "etc/apt.conf.d"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    sources = [f"deb [signed-by={KEYRING}] {mirror}/{archive} {suite} main" for suite, archive in ARCHIVES.items()]
    (folder / "etc/sources.list").write_text("\n".join(sources) + "\n")
    settings = {
        **{"Dir::State": folder / "state", "Dir::State::status": folder / "status", "Dir::Cache": folder / "cache"},
        **{"Dir::Etc": folder / "etc", "APT::Architecture": "amd64", "APT::Architectures": "amd64"},
        **{"APT::Install-Recommends": "false", "Acquire::Languages": "none", "APT::Sandbox::User": "root"},
    }
    file = folder / "apt.conf"
    file.write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    return file


def refreshed(mirror: str) -> Listed:
    """What the mirror has now of what is wanted and all that it needs; no digests yet."""
    with tempfile.TemporaryDirectory() as scratch:
        env = {**os.environ, "APT_CONFIG": str(apt_settings(Path(scratch), mirror)), "LC_ALL": "C"}
        run(["apt-get", "-q", "update"], env)
        records = run(["apt-cache", "dumpavail"], env)
        essential = [_name(record) for record in records.split("\n\n") if "\nEssential: yes" in record]
        names: set[str] = set()
        packages: list[Package] = []
        wanted = list(essential)
        for image, extra in WANTED.items():
            wanted += extra
            chosen = run(["apt-get", "-s", "-q", "-y", "install", *wanted], env)
            new = dict(re.findall(r"(?m)^Inst (\S+) \((\S+) ", chosen))
            packages += [_package(image, name, new[name], env) for name in sorted(set(new) - names)]
            names |= set(new)
        return Listed(_published(Path(scratch) / "state/lists"), {}, tuple(packages))


def _name(record: str) -> str:
    return record.removeprefix("Package: ").split("\n")[0]


def _package(image: str, name: str, version: str, env: dict[str, str]) -> Package:
    shown = run(["apt-cache", "show", f"{name}={version}"], env).split("\n\n")[0]
    fields = dict(line.split(": ", 1) for line in shown.splitlines() if ": " in line and line[:1].strip())
    archive = "debian-security" if "/updates/" in fields["Filename"] else "debian"
    return Package(image, name, version, fields["SHA256"], f"{archive}/{fields['Filename']}")


def _published(lists: Path) -> int:
    """The latest `Date:` of the archives' release files, in seconds since 1970."""
    dates = [re.search(r"(?m)^Date: (.+)$", file.read_text()) for file in lists.glob("*InRelease")]
    parsed = [datetime.datetime.strptime(found[1], "%a, %d %b %Y %H:%M:%S %Z") for found in dates if found]
    return int(max(parsed).replace(tzinfo=datetime.UTC).timestamp())


def fetched(packages: Iterable[Package], mirror: str, cache: Path) -> dict[Package, Path]:
    """Each package as a checked file in `cache`; ends with the name of the first that the mirror does not have."""
    cache.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(pool.map(lambda package: (package, _fetch(package, mirror, cache)), packages))


def _fetch(package: Package, mirror: str, cache: Path) -> Path:
    file = cache / f"{package.sha256}.deb"
    if file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == package.sha256:
        return file
    where = f"{mirror}/{package.path}"
    try:
        content = _download(where)
    except urllib.error.HTTPError as problem:
        fail(
            f"{package.name} {package.version} of images/base/packages.lock is not on the mirror any more "
            f"({problem.code} for {where}).",
            "tools/base --refresh lists what it has now; the base image then has another digest.",
        )
    except OSError as problem:
        fail(f"{where}: {problem}", "look at the network, or name another mirror in HARNESS_DEBIAN_MIRROR.")
    if hashlib.sha256(content).hexdigest() != package.sha256:
        fail(
            f"{package.name} {package.version} is not what the list's sha256 says.",
            "do not use it; look at the mirror.",
        )
    part = file.with_suffix(f".{os.getpid()}")
    part.write_bytes(content)
    part.replace(file)
    return file


def _download(where: str) -> bytes:
    """What lies there; tried again where the network, not the mirror, said no."""
    for wait_s in (1, 4, None):
        try:
            with urllib.request.urlopen(where, timeout=60) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError:
            raise
        except OSError:
            if wait_s is None:
                raise
            time.sleep(wait_s)
    raise AssertionError


def repository(files: dict[Package, Path], folder: Path) -> None:
    """An apt repository of exactly `files` in `folder`."""
    entries = []
    for package, file in sorted(files.items()):
        shutil.copyfile(file, folder / Path(package.path).name)
        fields = run(["dpkg-deb", "-f", file]).rstrip("\n")
        size = file.stat().st_size
        entries.append(f"{fields}\nFilename: ./{Path(package.path).name}\nSize: {size}\nSHA256: {package.sha256}\n")
    (folder / "Packages").write_text("\n".join(entries))


def root_file_system(image: str, listed: Listed, files: dict[Package, Path], to: Path) -> None:
    """Install an image's packages and nothing else, and pack what comes of it into the tar file `to`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "packages")
        folder.mkdir(mode=0o755)
        Path(scratch).chmod(0o755)  # apt reads it as a user of its own
        chosen = {package: files[package] for package in listed.of(image)}
        repository(chosen, folder)
        options = [f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT]
        options += [f"--dpkgopt=path-include={path}" for path in LEFT_IN]
        include = ",".join(sorted(package.name for package in chosen))
        # No apt in the image, so nothing of where its packages came from either.
        options += ['--customize-hook=rm -rf "$1"/etc/apt/sources.list* "$1"/var/cache/debconf/*-old']
        argv = [
            "mmdebstrap",
            "--quiet",
            "--format=tar",
            "--variant=essential",
            "--architectures=amd64",
            MERGED,
            *options,
        ]
        source = f"deb [trusted=yes] copy:{folder} ./"
        env = {**os.environ, "SOURCE_DATE_EPOCH": str(listed.epoch), "LC_ALL": "C.UTF-8"}
        # No suite: this repository calls itself none, and all of it is meant.
        run([*argv, f"--include={include}", "", to, source], env)


def configuration(layer_sha256: str, image: str, epoch: int) -> bytes:
    """The image's configuration; its sha256 is the image id."""
    created = datetime.datetime.fromtimestamp(epoch, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    content = {
        "architecture": "amd64",
        "os": "linux",
        "created": created,
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Labels": {"harness.stage": image},
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_sha256}"]},
        "history": [{"created": created, "created_by": f"tools/base {image}"}],
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def tag(image: str, digest: str) -> str:
    """A name for people, and for builders that take no image id."""
    return f"harness-{image if image == 'base' else 'base-build'}:{digest.removeprefix('sha256:')[:12]}"


def pack(layer: Path, image: str, epoch: int, to: Path) -> str:
    """Write the image of one layer as a file for `docker load`; its digest."""
    with layer.open("rb") as content:
        layer_sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    config = configuration(layer_sha256, image, epoch)
    digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
    name = f"{digest.removeprefix('sha256:')}.json"
    manifest = [{"Config": name, "RepoTags": [tag(image, digest)], "Layers": [f"{layer_sha256}/layer.tar"]}]
    with tarfile.open(to, "w", format=tarfile.PAX_FORMAT) as archive:
        for member, data in ((name, config), ("manifest.json", json.dumps(manifest).encode())):
            information = tarfile.TarInfo(member)
            information.size = len(data)
            archive.addfile(information, io.BytesIO(data))
        archive.add(layer, f"{layer_sha256}/layer.tar")
    return digest


def make(listed: Listed, mirror: str, folder: Path) -> dict[str, str]:
    """Both images as files `<image>.tar` in `folder`; their digests."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "harness/debian"
    files = fetched(listed.packages, mirror, cache)
    digests = {}
    for image in WANTED:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            layer = Path(scratch, "layer.tar")
            root_file_system(image, listed, files, layer)
            digests[image] = pack(layer, image, listed.epoch, folder / f"{image}.tar")
    return digests


def in_engine(digest: str) -> bool:
    """Does the Docker Engine have this image?"""
    return subprocess.run(["docker", "image", "inspect", digest], capture_output=True, check=False).returncode == 0


def load(folder: Path, digests: dict[str, str]) -> None:
    """Hand both files to the Docker Engine, which must find the same digests in them."""
    for image, digest in digests.items():
        run(["docker", "load", "--quiet", "--input", folder / f"{image}.tar"])
        if not in_engine(digest):
            fail(f"the Engine does not have {digest} after loading it.", "look at its log.")


def say(listed: Listed) -> None:
    """Print what there is, by its digest."""
    for image, digest in listed.digests.items():
        print(f"{image:5} {digest}  {tag(image, digest)}")


def check_engine() -> None:
    """End where no Docker Engine answers: before minutes of work, not after."""
    if not shutil.which("docker"):
        fail("there is no docker command here.", "install Docker, or use --out FOLDER and load the files elsewhere.")
    ended = subprocess.run(["docker", "version"], capture_output=True, text=True, check=False)
    if ended.returncode:
        why = (ended.stderr.strip().splitlines() or ["no answer"])[-1]
        fail(f"the Docker Engine does not answer: {why}", 'start one: eval "$(tools/engine)", or use --out FOLDER.')


def main(arguments: Sequence[str]) -> None:
    """Make what the arguments ask for."""
    parser = argparse.ArgumentParser(prog="tools/base")
    parser.add_argument("--refresh", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    mirror = mirror_of_host()
    if not options.out:
        check_engine()
    before = parse(LIST.read_text()) if LIST.exists() else None
    if not before and not options.refresh:
        fail(f"there is no {LIST.relative_to(ROOT)}.", "tools/base --refresh writes it.")
    listed = refreshed(mirror) if options.refresh or not before else before
    if not options.refresh and not options.out and all(in_engine(digest) for digest in listed.digests.values()):
        return say(listed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        made = make(listed, mirror, folder)
        if not options.refresh and made != listed.digests:
            differs = ", ".join(f"{image} {made[image]}" for image in made if made[image] != listed.digests.get(image))
            next_step = (
                "another mmdebstrap or dpkg? tools/base --refresh writes list and digests anew with the ones here."
            )
            fail(f"the list was followed, and something else came of it than it says: {differs}.", next_step)
        if not options.out:
            load(folder, made)
    listed = listed._replace(digests=made)
    if options.refresh:
        LIST.write_text(listing(listed))
        print(f"wrote {LIST.relative_to(ROOT)}")
    say(listed)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
