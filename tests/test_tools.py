"""The tools that make environments and locks: their decisions, with no installation and no network."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCK = """\
numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:aa
    # via torch
torch==2.13.0+cpu \\
    --hash=sha256:cc
    # via
    #   -r cpu.in
typer==1 \\
    --hash=sha256:bb
"""


@pytest.fixture(autouse=True)
def _tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


@pytest.fixture
def environments() -> ModuleType:
    return importlib.import_module("environments")


@pytest.fixture
def relock() -> ModuleType:
    return importlib.import_module("relock")


@pytest.fixture
def place(environments: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment `train` in a temporary folder, as if installed to the end."""
    lock = tmp_path / "cpu.txt"
    lock.write_text("six==1\n")
    directory = tmp_path / "train"
    (directory / "bin").mkdir(parents=True)
    (directory / "bin/python").symlink_to("/bin/sh")
    monkeypatch.setitem(environments.PLACES, "train", environments.Place(directory, lock, 10**9))
    (directory / environments.STAMP).write_text(environments.stamp_text("train"))
    return tmp_path


def test_torch_is_installed_by_itself_and_nothing_is_lost(environments: ModuleType) -> None:
    torch, others = environments.split_torch(LOCK)
    assert torch.startswith("torch==2.13.0+cpu \\\n    --hash=sha256:cc\n")
    assert "numpy" not in torch
    assert "typer" not in torch
    assert sorted((torch + others).splitlines()) == sorted(LOCK.splitlines())


def test_an_environment_is_ready_once_stamped_and_until_its_lock_changes(environments: ModuleType, place: Path) -> None:
    assert environments.is_ready("train")
    (place / "cpu.txt").write_text("six==2\n")
    assert not environments.is_ready("train")


def test_an_interrupted_installation_is_not_ready(environments: ModuleType, place: Path) -> None:
    (place / "train" / environments.STAMP).unlink()
    assert not environments.is_ready("train")


def test_an_environment_whose_python_is_gone_is_not_ready(environments: ModuleType, place: Path) -> None:
    (place / "train/bin/python").unlink()
    (place / "train/bin/python").symlink_to("/nonexistent/python3.11")
    assert not environments.is_ready("train")


def test_the_tests_environment_stands_in_for_the_control_plane(
    environments: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("harness", "tests"):
        monkeypatch.setitem(environments.PLACES, name, environments.PLACES["train"])
    (place / "train" / environments.STAMP).write_text(environments.stamp_text("tests"))
    assert environments.is_ready("harness")
    (place / "train" / environments.STAMP).write_text(environments.stamp_text("harness"))
    assert not environments.is_ready("tests")


def test_too_small_a_disk_is_said_before_anything_is_installed(
    environments: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = environments.shutil.disk_usage(place)._replace(free=10**8)
    monkeypatch.setattr(environments.shutil, "disk_usage", lambda _: free)
    with pytest.raises(SystemExit) as ended:
        environments.check_machine(["train"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "1.0 GB" in said
    assert "Next: free 0.9 GB" in said


def test_an_unknown_environment_names_those_that_exist(
    environments: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        environments.wanted(["trian"])
    assert "train" in capsys.readouterr().err


def test_without_an_argument_a_user_gets_all_but_the_test_tools(environments: ModuleType) -> None:
    assert environments.wanted([]) == ["harness", "train", "serve"]
    assert environments.wanted(["harness", "tests", "train"]) == ["tests", "train"]


@pytest.mark.parametrize(
    ("output", "word"),
    [
        ("error: Failed to fetch: `x`\n  Caused by: dns error: failed to lookup address", "network"),
        ("error: failed to copy: No space left on device (os error 28)", "disk"),
        ("error: Hash mismatch for `six==1.17.0`", "mirror"),
        ("error: something new", "lines above"),
    ],
)
def test_a_failed_installation_names_the_next_step(environments: ModuleType, output: str, word: str) -> None:
    assert word in environments.advice(output)


@pytest.mark.parametrize(
    ("python", "said", "next_step"),
    [
        ("[ $1 = --version ] && echo Python 3.9.2 && exit; exit 1", "python3 is: Python 3.9.2", "install Python 3.11"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "python3 cannot make virtual environments", "python3-venv"),
    ],
    ids=["too old", "without venv"],
)
def test_an_unusable_python_is_said_with_the_next_step(tmp_path: Path, python: str, said: str, next_step: str) -> None:
    (tmp_path / "python3").write_text(f"#!/bin/sh\n{python}\n")
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    copy = tmp_path / "checkout/tools/setup"
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / "tools/setup").read_text())
    ended = subprocess.run(["/bin/bash", copy], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Next:" in ended.stderr
    assert next_step in ended.stderr


def test_hashes_of_other_pythons_are_added_to_one_requirement_and_sorted(relock: ModuleType) -> None:
    extra = relock.wheel_hashes("# comment\ntorch==2.13.0+cpu cp312 dd\ntorch==2.13.0+cpu cp313 bb\n")
    made = relock.add_hashes(LOCK, extra)
    assert (
        "torch==2.13.0+cpu \\\n    --hash=sha256:bb \\\n    --hash=sha256:cc \\\n    --hash=sha256:dd\n    # via\n"
        in made
    )
    assert (
        made.replace(
            "    --hash=sha256:bb \\\n    --hash=sha256:cc \\\n    --hash=sha256:dd\n", "    --hash=sha256:cc\n"
        )
        == LOCK
    )
    assert relock.add_hashes(made, extra) == made


@pytest.mark.parametrize("lock", [*ROOT.glob("tools/requirements/*.txt"), *ROOT.glob("images/*/*.txt")], ids=str)
def test_every_requirement_of_every_lock_has_a_hash_and_no_host(lock: Path, relock: ModuleType) -> None:
    text = lock.read_text()
    entries = re.split(r"\n(?=\S)", text.strip())
    assert all("==" in entry and "--hash=sha256:" in entry for entry in entries)
    assert "://" not in text
    for requirement, digests in relock.wheel_hashes(relock.TORCH_WHEELS.read_text()).items():
        if requirement in text:
            assert all(digest in text for digest in digests)
