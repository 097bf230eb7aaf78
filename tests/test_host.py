"""Facts of this host, and which commit of the harness is at work."""

import os
import subprocess
from pathlib import Path

import pytest

from harness import host


def git(folder: Path, *argv: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", "-C", str(folder), *identity, *argv], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


def test_a_changed_tree_is_called_dirty(checkout: Path) -> None:
    clean = host.commit(checkout)
    assert clean is not None
    assert len(clean) == 40
    (checkout / "file").write_text("two")
    assert host.commit(checkout) == f"{clean}+dirty"


def test_a_carried_copy_may_say_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_COMMIT", raising=False)
    assert host.commit(tmp_path) is None
    monkeypatch.setenv("HARNESS_COMMIT", "0" * 40)
    assert host.commit(tmp_path) == "0" * 40


def test_the_host_has_cores_and_memory() -> None:
    assert 1 <= host.cpu_count() <= (os.cpu_count() or 1)
    assert host.memory_bytes() > 100_000_000
    assert host.cpu_name()
