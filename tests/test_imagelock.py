"""images.lock: what is written is what is read, and nothing is lost or guessed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from harness.containers import imagelock
from harness.containers.imagelock import Base, Image, ImageLock
from harness.errors import HarnessError

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


def image(**more: object) -> Image:
    given = {"image": A, "base": B, "lock": C, "built": "2026-11-22T02:00:00Z", "source_revision": "0" * 40,
             "versions": {"torch": "2.13.0+cpu"}, "size_bytes": 1, **more}  # fmt: skip
    return Image.model_validate(given)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    lock = ImageLock(base=Base(digest=B, source="tools/base", packages_sha256="d" * 64))
    lock = imagelock.with_image(lock, "train-cuda", image(cuda="13.0", architectures=("9.0", "10.0")))
    imagelock.write(tmp_path / "images.lock", lock)
    assert imagelock.read(tmp_path / "images.lock") == lock
    # 10.0 and 13.0 stay words: read as numbers, 10.0 would become 10.
    assert "'10.0'" in (tmp_path / "images.lock").read_text()


def test_without_a_file_nothing_is_built(tmp_path: Path) -> None:
    with pytest.raises(HarnessError) as refused:
        imagelock.read(tmp_path / "images.lock").image("train", "cpu")
    assert refused.value.hint == "build it with `harness build train --variant cpu`"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("version: 2\n", "upgrade harness"),
        ("version: 1\nimages: {train-cpu: {image: latest}}\n", "train-cpu"),
        ("version: 1\nbase: {digest: 'debian:12', source: x}\n", "base.digest"),
        ("version: 1\nversion: 1\n", "no lock of images"),
        ("[", "no lock of images"),
        ("- a\n", "no lock of images"),
    ],
)
def test_a_broken_file_says_so(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "images.lock").write_text(text)
    with pytest.raises(HarnessError) as refused:
        imagelock.read(tmp_path / "images.lock")
    assert says in f"{refused.value.message} {refused.value.hint}"


def test_an_image_is_known_by_its_id_alone() -> None:
    with pytest.raises(ValidationError):
        image(image="harness-train:cpu")


def test_builds_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "images.lock"

    def add(name: str) -> None:
        imagelock.change(path, lambda lock: imagelock.with_image(lock, name, image()))

    names = [f"train-{number}" for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, names))
    assert sorted(imagelock.read(path).images) == sorted(names)


def test_a_new_base_keeps_the_images_of_the_old_one() -> None:
    lock = imagelock.with_image(ImageLock(), "train-cpu", image())
    assert imagelock.with_base(lock, Base(digest=A, source="tools/base")).images == lock.images
