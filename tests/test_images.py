"""The CPU images, really built from the committed locks by a real Engine, and looked into."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.containers import build, bundle, context, engine, imagelock, requirements, verify, wheelhouse
from harness.containers.build import CHECKOUT, Request
from harness.errors import HarnessError

if TYPE_CHECKING:
    from docker import DockerClient

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

LARGEST_BYTES = {"train": 2.5e9, "serve": 4.5e9}
NAMES = ("train", "serve")


@pytest.mark.parametrize("name", NAMES)
def test_an_image_stands_in_images_lock_and_is_no_larger_than_it_may_be(cpu_images: dict[str, Any], name: str) -> None:
    image = cpu_images[name].image
    assert imagelock.read(imagelock.path_of()).images[f"{name}-cpu"] == image
    assert image.lock == requirements.digest(CHECKOUT / f"images/{name}/cpu.txt")
    assert image.base == build.base_of(CHECKOUT).digest
    assert 0 < image.size_bytes < LARGEST_BYTES[name]
    assert image.cuda is None
    assert image.versions["torch"] == "2.13.0+cpu"


def test_a_second_build_with_nothing_changed_takes_seconds(cpu_images: dict[str, Any]) -> None:
    began = time.monotonic()
    again = [build.build(request, CHECKOUT, print) for request in build.requests(None, "cpu", None, None, 2)]
    assert time.monotonic() - began < 10
    assert all(one.unchanged for one in again)
    assert {one.image.image for one in again} == {one.image.image for one in cpu_images.values()}


@pytest.mark.parametrize("name", NAMES)
def test_everything_in_an_image_imports_and_is_as_locked(cpu_images: dict[str, Any], name: str) -> None:
    verdict = verify.verify(f"{name}-cpu", CHECKOUT)
    assert [check for check in verdict.checks if check.state != "ok"] == []
    assert verdict.image == cpu_images[name].image.image
    assert verdict.packages > 40
    assert verdict.imported >= verdict.packages * 0.8
    assert any("librar" in check.what or "extension" in check.what for check in verdict.checks)


def test_no_container_of_ours_is_left(cpu_images: dict[str, Any]) -> None:
    client = engine.connect()
    try:
        assert client.containers.list(all=True, filters={"label": engine.LABEL}) == []
    finally:
        client.close()


PARTS = ("filelock", "packaging")


def cut(lock: Path, names: tuple[str, ...]) -> None:
    """Leave only some packages in a lock."""
    entries = re.split(r"(?m)^(?=[a-z0-9])", lock.read_text())
    lock.write_text("".join(entry for entry in entries if entry.split("==")[0] in names))


def bases(client: DockerClient) -> dict[str, str]:
    """The two bases by tag: BuildKit finds no local image by its id."""
    wanted = build.base_of(CHECKOUT)
    found = {"BASE": wanted.digest, "BUILD_BASE": wanted.build_digest}
    return {name: client.images.get(str(digest)).tags[0] for name, digest in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_buildkit_builds_the_containerfiles_too(cpu_images: dict[str, Any], name: Any, tmp_path: Path) -> None:
    """With two small packages for the hundreds of the real lock: every step runs, by the Engine's other builder."""
    shutil.copytree(CHECKOUT / "images", tmp_path / "images")
    cut(tmp_path / f"images/{name}/cpu.txt", PARTS)
    found = context.sources(tmp_path / "images", name, "cpu")
    houses = tuple(
        wheelhouse.gather(Path(lock), CHECKOUT / ".wheels", print) for lock in (found.lock, *found.build_locks)
    )
    client = engine.connect(timeout_s=300)
    try:
        asked = {"version": "2", "dockerfile": "Containerfile", "networkmode": "none",
                 "buildargs": json.dumps({**bases(client), "VARIANT": "cpu", "REVISION": "r"})}  # fmt: skip
        with context.stream(found, houses, 0) as tar:
            answer = client.api._post(client.api._url("/build"), data=tar, params=asked, stream=True)
            lines = list(client.api._stream_helper(answer, decode=True))
        (made,) = [line["aux"]["ID"] for line in lines if line.get("id") == "moby.image.id"]
        seen = engine.run_offline(client, made, ["python", "-c", f"import os, {', '.join(PARTS)}; print(os.getuid())"])
        labels = client.images.get(made).labels
        client.images.remove(made)
    finally:
        client.close()
    assert seen.output.strip() == "10001"
    assert (labels["harness.environment"], labels["org.opencontainers.image.revision"]) == (name, "r")


def test_one_hash_changed_in_a_real_lock_makes_build_refuse_with_the_name(
    cpu_images: dict[str, Any], tmp_path: Path
) -> None:
    """The index, the wheels and the Engine are the real ones; the checkout is a copy whose lock was tampered with."""
    shutil.copytree(CHECKOUT / "images", tmp_path / "images")
    lock = tmp_path / "images/train/cpu.txt"
    (peft,) = [entry for entry in requirements.read(lock) if entry.name == "peft"]
    text = lock.read_text()
    for digest in peft.hashes:
        text = text.replace(digest, "0" * 63 + digest[-1])
    lock.write_text(text)
    with pytest.raises(HarnessError, match=r"no hash of peft 0\.\d+\.\d+ is that of peft-.*\.whl"):
        build.build(Request(environment="train", variant="cpu"), tmp_path, print)


MATRIX = """\
version: 1
name: one
defaults: {device: cpu, variant: tiny-hybrid, seq_len: 64, micro_batch: 2, steps: 4, warmup_steps: 1}
train:
  - method: [lora]
"""


def test_a_bundle_is_installed_and_used_with_the_network_off(cpu_images: dict[str, Any], tmp_path: Path) -> None:
    """In the bare base image: Python and nothing else, no pip, no network; a case is measured in what comes of it."""
    made = bundle.bundle(build.requests("train", "cpu", None, None, 2), CHECKOUT, tmp_path / "bundle", print)
    assert made.environments == ("train-cpu",)
    (tmp_path / "bundle/one.yaml").write_text(MATRIX)
    steps = (
        "python3.11 /bundle/install.py",
        "cd /bundle",
        ".venv/bin/harness run one.yaml --json > run.json",
        "python3.11 install.py > again.txt",
    )
    client = engine.connect(timeout_s=900)
    try:
        client.containers.run(
            build.base_of(CHECKOUT).digest, ["sh", "-ec", " && ".join(steps)], network_mode="none", remove=True,
            volumes={str(tmp_path / "bundle"): {"bind": "/bundle", "mode": "rw"}}, shm_size="1g",
        )  # fmt: skip
    finally:
        client.close()
    assert (tmp_path / "bundle/again.txt").read_text().count("is installed") == 2
    (case,) = json.loads((tmp_path / "bundle/run.json").read_text())["cases"]
    record = json.loads((tmp_path / "bundle" / case["record"]).read_text())
    assert record["status"] == "measured"
    (environment,) = record["provenance"]["environments"]
    assert (environment["box"], environment["pinned"]) == ("venv", True)
    assert record["provenance"]["commit"] == json.loads((tmp_path / "bundle/bundle.json").read_text())["revision"]
