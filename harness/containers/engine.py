"""The Docker Engine: finding it, and asking it; what it refuses is a HarnessError."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.errors import HarnessError

if TYPE_CHECKING:
    from docker import DockerClient

LABEL = "harness.container"
"""On every container of ours that is no job's."""
DEFAULT = "unix:///var/run/docker.sock"
API = "1.41"
"""Engine API of Docker 20.10, which every later Engine still speaks; named, so that connecting asks nothing."""
ANSWER_S = 30
"""An Engine that is busy with a build may take seconds to answer."""
COMMAND_S = 3600
"""Without a word from the Engine while a command runs in a container: a cold disk reads vLLM for minutes."""


class Ended(NamedTuple):
    """A command that ran in a container."""

    status: int
    output: str
    errors: str


def address() -> str:
    """Where the Engine is looked for: `$DOCKER_HOST`, or the usual socket."""
    return os.environ.get("DOCKER_HOST") or DEFAULT


def connect(timeout_s: int = ANSWER_S) -> DockerClient:
    """A client of the Engine at `address()`; HarnessError where none answers."""
    import docker

    client = None
    try:
        _knock(address())
        client = docker.from_env(timeout=timeout_s, version=API)
        client.ping()
    except (docker.errors.DockerException, OSError) as problem:
        if client is not None:
            client.close()
        raise HarnessError(
            f"no Docker Engine answers at {address()} ({_reason(problem)})",
            "start one (in a checkout: tools/engine), or set DOCKER_HOST to one that runs",
        ) from None
    return client


def _knock(where: str) -> None:
    """OSError where a socket file is missing or nobody listens: the SDK would leave its own half of it open."""
    if where.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as door:
            door.connect(where.removeprefix("unix://"))


def _reason(problem: BaseException) -> str:
    """The innermost cause in a few words: the SDK wraps it several times."""
    while (inner := problem.__cause__ or problem.__context__) is not None:
        problem = inner
    return getattr(problem, "strerror", None) or type(problem).__name__


@contextlib.contextmanager
def refusals(what: str, hint: str = "") -> Iterator[None]:
    """Inside, what the Engine refuses becomes a HarnessError: `what` and its own words; so does silence."""
    import docker
    import requests

    try:
        yield
    except docker.errors.APIError as problem:
        raise HarnessError(f"{what}: {problem.explanation or problem}", hint) from None
    except docker.errors.DockerException as problem:
        raise HarnessError(f"{what}: {problem}", hint) from None
    except requests.exceptions.RequestException as problem:
        said = _reason(problem)
        raise HarnessError(f"{what}: the Engine at {address()} did not answer ({said})", hint) from None


def inspect(client: DockerClient, image: str) -> dict[str, Any] | None:
    """What the Engine knows of an image (id, NAME@sha256 or tag), or `None` where it has none."""
    import docker

    try:
        found: dict[str, Any] = client.api.inspect_image(image)  # type: ignore[no-untyped-call]
    except (docker.errors.ImageNotFound, docker.errors.NullResource):
        return None
    return found


def run_offline(client: DockerClient, image: str, argv: list[str], check: bool = True) -> Ended:
    """Run a command in a container of `image` with no network and no privileges, removed afterwards.

    HarnessError where it cannot start, or with `check` where it exits other than 0.
    """
    with refusals(f"{image[:19]} cannot be started"):
        container = client.containers.create(
            image, argv, network_mode="none", cap_drop=["ALL"], security_opt=["no-new-privileges"], shm_size="1g",
            labels={LABEL: "ask"},
        )  # fmt: skip
        try:
            container.start()
            status = int(container.wait(timeout=COMMAND_S)["StatusCode"])
            output, errors = (
                container.logs(stdout=out, stderr=not out).decode("utf-8", "replace") for out in (True, False)
            )
        finally:
            container.remove(force=True)
    if check and status:
        last = "\n  ".join(errors.strip().splitlines()[-12:])
        raise HarnessError(f"{argv[0]} in {image[:19]} ended with exit code {status}", last)
    return Ended(status, output, errors)
