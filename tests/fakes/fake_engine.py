"""An Engine that has given images, for tests that may reach none; and a checkout's `images.lock`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from harness.containers import engine, imagelock, requirements


class Client:
    """All that the docker box needs of one."""

    def close(self) -> None:
        """Nothing to close."""


def install(monkeypatch: pytest.MonkeyPatch, images: Iterable[str], tags: dict[str, str] | None = None) -> None:
    """From now on the Engine has just these image ids, and these tags of ids."""
    known = {name: name for name in images} | (tags or {})

    def inspect(client: Any, image: str) -> dict[str, Any] | None:
        return {"Id": known[image]} if image in known else None

    monkeypatch.setattr(engine, "connect", lambda *_: Client())
    monkeypatch.setattr(engine, "inspect", inspect)


def lock(checkout: Path, **changed: str) -> dict[str, str]:
    """Write an `images.lock` with one image for each environment and variant; ids by name."""
    ids = {}
    content = imagelock.ImageLock()
    for number, name in enumerate(("train-cpu", "train-cuda", "serve-cpu", "serve-cuda")):
        environment, variant = name.split("-")
        path = checkout / "images" / environment / f"{variant}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("torch==2.13.0+cpu\n")
        ids[name] = f"sha256:{number + 1:064x}"
        image = imagelock.Image(
            image=ids[name], base=f"sha256:{0:064x}", lock=requirements.digest(path), built="2026-01-01T00:00:00Z",
            source_revision="0" * 40, versions={"python": "3.11.2", "torch": "2.13.0+cpu"}, size_bytes=1,
        ).model_copy(update=changed)  # fmt: skip
        content = imagelock.with_image(content, name, image)
    imagelock.write(imagelock.path_of(checkout), content)
    return ids
