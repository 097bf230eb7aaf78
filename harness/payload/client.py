"""HTTP to a server on this machine: JSON in, JSON out, no proxy."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Refused(Exception):
    """The server answered, but not with what was asked for."""


def alive(base_url: str) -> bool:
    """Does `/health` answer 200 within a second."""
    try:
        with _DIRECT.open(f"{base_url}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def post(base_url: str, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The JSON object that `path` answers; `Refused` with the server's words, OSError where it does not answer."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(base_url + path, data, {"Content-Type": "application/json"})
    try:
        with _DIRECT.open(request, timeout=timeout_s) as answer:
            text = answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        with error:
            said = error.read().decode("utf-8", "replace")[:500]
        raise Refused(f"{path} answered {error.code}: {said}") from error
    return _object(path, text)


def _object(path: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise Refused(f"{path} answered no JSON: {text[:200]!r}") from error
    if not isinstance(found, dict):
        raise Refused(f"{path} answered no JSON object: {text[:200]!r}")
    return found
