"""Images that a cluster keeps: which one a payload gets, and the digest that pins it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from harness.errors import HarnessError
from harness.schema import Environment, EnvironmentName

VARIABLES: Mapping[EnvironmentName, str] = {"train": "HARNESS_IMAGE_TRAIN", "serve": "HARNESS_IMAGE_SERVE"}
"""Name the images where no site file does."""
_DIGEST = re.compile(r"@(sha256:[0-9a-f]{64})$")


def image(images: Mapping[EnvironmentName, str], name: EnvironmentName) -> str:
    """The image for payloads of kind `name`; HarnessError where nothing names one."""
    found = images.get(name) or os.environ.get(VARIABLES[name])
    if found:
        return found
    raise HarnessError(f"no image is named for {name}", f"give `images: {{{name}: ...}}` in the site file, or "
                                                        f"set {VARIABLES[name]}")  # fmt: skip


def environment(box: str, images: Mapping[EnvironmentName, str], name: EnvironmentName) -> Environment:
    """What pins the image: its registry's digest, or that of the file; what it holds, its jobs say themselves."""
    found = image(images, name)
    return Environment(name=name, box=box, digest=digest(found), pinned=True, python="", libraries={})


def digest(found: str) -> str:
    """`sha256:...` of an image in a registry or of a file; HarnessError where it is neither."""
    if match := _DIGEST.search(found):
        return match[1]
    path = Path(found)
    if path.is_absolute() and path.is_file():
        status = path.stat()
        return _of_file(found, status.st_size, status.st_mtime_ns)
    if path.is_absolute():
        raise HarnessError(f"there is no image {found}", "name a file that every node sees, by its absolute path")
    raise HarnessError(f"the image {found} is not pinned", "name it by digest, as in registry/name@sha256:...")


@cache
def _of_file(path: str, size: int, mtime_ns: int) -> str:
    """Read whole, once a process for each state of the file: several GiB take seconds."""
    del size, mtime_ns
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
