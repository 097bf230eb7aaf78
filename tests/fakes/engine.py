"""A Docker Engine of plain values: images by id or name, and answers that a test writes for commands in them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import docker


class FakeEngine:
    """As much of the SDK's client as the product uses."""

    def __init__(self, images: dict[str, dict[str, Any]] | None = None) -> None:
        self.known = images or {}
        self.builds: list[dict[str, Any]] = []
        self.context: dict[str, tarfile.TarInfo] = {}
        self.contents: dict[str, bytes] = {}
        self.says: list[dict[str, Any]] = []
        self.answer: Callable[[list[str]], tuple[int, str, str]] = lambda argv: (0, "", "")
        self.pulled: list[str] = []
        self.api = SimpleNamespace(inspect_image=self._inspect, build=self._build)
        self.images = SimpleNamespace(pull=self._pull, get=lambda image: SimpleNamespace(save=lambda: [b"lay", b"ers"]))
        self.containers = SimpleNamespace(create=self._create)

    def _inspect(self, image: str) -> dict[str, Any]:
        if image not in self.known:
            raise docker.errors.ImageNotFound(image)
        return self.known[image]

    def _pull(self, name: str, tag: str) -> None:
        self.pulled.append(f"{name}@{tag}")
        self.known[f"{name}@{tag}"] = {"Id": tag}

    def _build(self, **given: Any) -> Iterator[dict[str, Any]]:
        content = io.BytesIO(given.pop("fileobj").read())
        self.builds.append(given)
        with tarfile.open(fileobj=content) as tar:
            self.context = {member.name: member for member in tar}
            self.contents = {name: tar.extractfile(member).read() for name, member in self.context.items()}  # type: ignore[union-attr]
        for line in self.says:
            if "aux" in line:
                self.known[line["aux"]["ID"]] = {"Id": line["aux"]["ID"], "Size": 7}
            yield line

    def _create(self, image: str, argv: list[str], **given: Any) -> Any:
        assert given["network_mode"] == "none"
        assert given["cap_drop"] == ["ALL"]
        status, out, err = self.answer(argv)
        return SimpleNamespace(
            start=lambda: None,
            wait=lambda timeout: {"StatusCode": status},
            logs=lambda stdout, stderr: (out if stdout else err).encode(),
            remove=lambda force: None,
        )


def installed(versions: dict[str, str], **more: Any) -> str:
    """What `inside.py installed` prints in an image with these packages, each of one import name."""
    found = {name: {"version": version, "imports": [name.replace("-", "_")]} for name, version in versions.items()}
    whole = {"python": "3.11.2", "distributions": found, "cuda": None, "uid": 10001, "compilers": [], "packages": True}
    return json.dumps(whole | more) + "\n"
