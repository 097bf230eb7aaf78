"""tools/base: a committed list of Debian packages, and the same image from it every time."""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.error
from email.message import Message
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
LIST = ROOT / "images/base/packages.lock"


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("base")


def test_the_committed_list_names_every_package_by_hash_and_reads_back_as_it_was_written(base: ModuleType) -> None:
    text = LIST.read_text()
    listed = base.parse(text)
    assert base.listing(listed) == text
    assert set(listed.digests) == {"base", "build"}
    assert all(re.fullmatch("[0-9a-f]{64}", package.sha256) for package in listed.packages)
    names = [package.name for package in listed.packages]
    assert len(set(names)) == len(names)
    assert "://" not in text


def test_the_base_has_no_compiler_and_the_build_image_is_the_base_and_more(base: ModuleType) -> None:
    listed = base.parse(LIST.read_text())
    in_base = {package.name for package in listed.of("base")}
    in_build = {package.name for package in listed.of("build")}
    assert in_base < in_build
    compilers = re.compile(r"gcc(-\d+)?|g\+\+(-\d+)?|cpp(-\d+)?|clang.*|binutils|tcc|apt|.*-dev")
    assert [name for name in in_base if compilers.fullmatch(name)] == []
    assert {"gcc", "g++", "python3.11-dev"} <= in_build - in_base


def test_an_image_has_one_digest_whenever_it_is_packed_and_another_for_other_content(
    base: ModuleType, tmp_path: Path
) -> None:
    layer = tmp_path / "layer.tar"
    layer.write_bytes(b"one")
    digests = {base.pack(layer, "base", 1, tmp_path / f"{turn}.tar") for turn in range(2)}
    assert len(digests) == 1
    layer.write_bytes(b"two")
    assert base.pack(layer, "base", 1, tmp_path / "other.tar") not in digests
    with tarfile.open(tmp_path / "other.tar") as packed:
        member = packed.extractfile("manifest.json")
        assert member is not None
        (manifest,) = json.load(member)
        assert set(packed.getnames()) == {"manifest.json", manifest["Config"], *manifest["Layers"]}


def test_a_package_that_the_mirror_has_no_more_is_named_with_the_next_step(
    base: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(where: str, timeout: float) -> io.BytesIO:
        raise urllib.error.HTTPError(where, 404, "Not Found", Message(), None)

    monkeypatch.setattr(base.urllib.request, "urlopen", gone)
    package = base.Package("base", "openssl", "3.0-1", "0" * 64, "debian/pool/main/o/openssl/openssl_3.0-1_amd64.deb")
    with pytest.raises(SystemExit):
        base.fetched([package], "http://mirror.test", tmp_path)
    said = capsys.readouterr().err
    assert "openssl 3.0-1" in said
    assert "tools/base --refresh" in said


def test_a_package_that_is_not_what_the_list_names_is_refused(
    base: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(base.urllib.request, "urlopen", lambda where, timeout: io.BytesIO(b"something else"))
    package = base.Package("base", "openssl", "3.0-1", "0" * 64, "debian/pool/openssl.deb")
    with pytest.raises(SystemExit):
        base.fetched([package], "http://mirror.test", tmp_path)
    assert "openssl 3.0-1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_mirror_is_the_one_that_was_named_or_that_apt_uses(
    base: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HARNESS_DEBIAN_MIRROR", "http://mirror.test/")
    assert base.mirror_of_host() == "http://mirror.test"
    monkeypatch.delenv("HARNESS_DEBIAN_MIRROR")
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho http://apt.test/debian-security/\necho http://apt.test/debian/\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert base.mirror_of_host() == "http://apt.test"
    apt.write_text("#!/bin/sh\n")
    with pytest.raises(SystemExit):
        base.mirror_of_host()


@pytest.mark.docker
def test_two_builds_from_one_list_give_one_digest_and_the_engine_knows_the_image_by_it(
    base: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("mmdebstrap"):
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "mmdebstrap"], check=True)
    monkeypatch.setattr(base, "WANTED", {"base": base.WANTED["base"]})  # the other is made the same way, and larger
    listed = base.parse(LIST.read_text())
    try:
        digests = base.make(listed, base.mirror_of_host(), tmp_path)
        assert digests["base"] == listed.digests["base"]
    except SystemExit:
        # Debian has replaced a package of the committed list since: a list of today shows the same.
        print("the mirror has moved on from images/base/packages.lock; using what it has now", file=sys.stderr)
        listed = base.refreshed(base.mirror_of_host())
        digests = base.make(listed, base.mirror_of_host(), tmp_path)
    assert base.make(listed, base.mirror_of_host(), tmp_path) == digests
    base.load(tmp_path, digests)
    shown = subprocess.run(["docker", "run", "--rm", "--network=none", digests["base"], "python3.11", "-V"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert shown.stdout.startswith("Python 3.11.")
