"""Boxes: what is installed, is it what the lock says, and what of this process's environment a payload sees."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from fakes import fake_engine

from harness import boxes
from harness.boxes.variables import allowed
from harness.boxes.venv import VenvBox
from harness.errors import HarnessError
from harness.installed import Installed, read_lock
from harness.schema import Job

JOB = Job(
    id="j", environment="train", case_ids=("c",), argv=("python", "-m", "harness.payload.train", "job.json"),
    env={"OMP_NUM_THREADS": "2", "LANG": "of-the-job"}, device="cpu", devices=1, time_limit_s=1, stall_s=1, payload={},
)  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose train environment is a fake interpreter that has torch 2.13.0+cpu, trl 1.16.0 and pip."""
    interpreter(tmp_path / ".envs" / "train" / "bin" / "python", {"torch": "2.13.0+cpu", "TRL": "1.16.0", "pip": "26"})
    return tmp_path


def interpreter(path: Path, distributions: dict[str, str]) -> None:
    """A fake Python that answers the probe with `distributions`."""
    path.parent.mkdir(parents=True)
    answer = f'{{"python": "3.11.7", "distributions": {distributions}}}'.replace("'", '"')
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)


def lock(checkout: Path, text: str, name: str = "cpu.txt") -> None:
    folder = checkout / "images" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.mark.parametrize("name", list(boxes.REGISTRY))
def test_every_box_keeps_the_contract(
    name: str, tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_PYTHON", sys.executable)
    monkeypatch.setenv("HARNESS_IMAGE_TRAIN", f"registry/train@sha256:{'a' * 64}")
    fake_engine.install(monkeypatch, fake_engine.lock(checkout).values())
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-secret")
    box = boxes.get(name, checkout)
    assert box.name == name
    environment = box.environment("train")
    assert (environment.box, environment.name) == (name, "train")
    assert environment.digest.startswith("sha256:")
    assert environment.pinned == (not box.differences("train"))
    command = box.wrap(JOB, tmp_path / "job", tmp_path / "payload")
    assert command.argv[-len(JOB.argv[1:]) :] == JOB.argv[1:]
    assert command.cwd == str(tmp_path / "job")
    inside = command.env | dict(word.split("=", 1) for word in command.argv if re.match(r"[A-Z_]+=", word))
    assert inside["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "payload")
    assert (inside["OMP_NUM_THREADS"], inside["LANG"]) == ("2", "of-the-job")
    assert not any("secret" in value for value in (*inside.values(), *command.argv))


def test_an_unknown_box_names_the_nearest() -> None:
    with pytest.raises(HarnessError, match="did you mean venv"):
        boxes.get("venb")


# ---------------------------------------------------------------- venv


def test_a_missing_environment_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="the serve environment is missing") as caught:
        boxes.get("venv", tmp_path).environment("serve")
    assert caught.value.hint == "make it with ./tools/setup serve"


def test_environments_can_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_ENVS", str(tmp_path))
    assert boxes.environments_root() == tmp_path
    assert boxes.get("venv").wrap(JOB, tmp_path, tmp_path).argv[0] == str(tmp_path / "train" / "bin" / "python")


def test_it_is_pinned_where_it_is_what_the_lock_says(checkout: Path) -> None:
    lock(checkout, "torch==2.13.0+cpu \\\n    --hash=sha256:00\ntrl==1.16.0 ; python_version > '3' \\\n")
    environment = VenvBox(checkout).environment("train")
    assert environment.pinned
    assert environment.libraries == {"torch": "2.13.0+cpu", "trl": "1.16.0"}


@pytest.mark.parametrize(
    ("text", "difference"),
    [
        ("torch==2.13.0+cpu\n", "trl 1.16.0 is installed, and the lock does not have it"),
        ("torch==2.12.0\ntrl==1.16.0\n", "torch 2.13.0+cpu is installed, and the lock says 2.12.0"),
        ("torch==2.13.0+cpu\ntrl==1.16.0\npeft==0.21.2\n", "peft is in the lock, and not installed"),
    ],
)
def test_it_says_how_it_differs_from_the_lock(checkout: Path, text: str, difference: str) -> None:
    lock(checkout, text)
    assert VenvBox(checkout).differences("train") == (difference,)
    assert not VenvBox(checkout).environment("train").pinned


def test_the_nearest_of_several_locks_counts(checkout: Path) -> None:
    lock(checkout, "torch==2.13.0\ntrl==1.16.0\nnvidia-nccl-cu13==2.28.0\n", "cuda.txt")
    lock(checkout, "torch==2.13.0+cpu\ntrl==1.16.0\n")
    assert VenvBox(checkout).environment("train").pinned


def test_without_a_lock_it_is_not_pinned(checkout: Path) -> None:
    assert VenvBox(checkout).differences("train") == ("there is no lock in images/train",)


def test_a_lock_with_markers() -> None:
    found = read_lock(
        "# via x\nNumPy==2.4.6 ; python_full_version < '3.12' \\\n    --hash=sha256:00\n"
        "numpy==2.5.5 ; python_version > '3.11'\n"
        "hf_xet==1.8.0 ; platform_machine == 'x86_64' \\\nidna==3.20 \\\n"
    )
    assert found == {"numpy": ({"2.4.6", "2.5.5"}, False), "hf-xet": ({"1.8.0"}, False), "idna": ({"3.20"}, True)}


def test_its_programs_come_first_on_the_path(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    path = VenvBox(checkout).wrap(JOB, checkout, checkout).env["PATH"]
    assert path == f"{checkout}/.envs/train/bin:/usr/bin"


# ---------------------------------------------------------------- found


def test_found_is_never_pinned_and_sees_the_python_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_PYTHON", sys.executable)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    bare = boxes.get("found").environment("train")
    info = tmp_path / "site" / "trl-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", "site")
    monkeypatch.chdir(tmp_path)
    more = boxes.get("found").environment("train")
    assert not more.pinned
    assert more.libraries["trl"] == "9.9"
    assert more.digest != bare.digest
    assert boxes.get("found").wrap(JOB, tmp_path, tmp_path / "p").env["PYTHONPATH"] == f"{tmp_path}/p:{tmp_path}/site"


def test_a_python_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_PYTHON", "/nowhere/python")
    with pytest.raises(HarnessError, match="HARNESS_PYTHON=/nowhere/python is no program"):
        boxes.get("found").environment("train")


def test_a_python_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("HARNESS_PYTHON", str(broken))
    with pytest.raises(HarnessError, match="does not say what it has installed: no such library"):
        boxes.get("found").environment("train")


# ---------------------------------------------------------------- digest and variables


def test_a_digest_depends_on_every_version_and_on_no_order() -> None:
    one = Installed(python="3.11.7", distributions={"a": "1", "b": "2"})
    assert one.digest == Installed(python="3.11.7", distributions={"b": "2", "a": "1"}).digest
    others = [{"a": "1", "b": "3"}, {"a": "1"}, {"a": "1", "b": "2", "c": "1"}]
    digests = {Installed(python="3.11.7", distributions=other).digest for other in others}
    digests |= {one.digest, Installed(python="3.12.0", distributions=one.distributions).digest}
    assert len(digests) == 5


def test_what_may_pass_and_what_never_does() -> None:
    site = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "NCCL_SOCKET_IFNAME": "eth0", "TRITON_CACHE_DIR": "/c",
            "FLASHINFER_WORKSPACE_BASE": "/c"}  # fmt: skip
    refused = {
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "NVIDIA_API_KEY", "AWS_SECRET_ACCESS_KEY",
        "NCCL_PASSWORD", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV", "HTTPS_PROXY", "OMP_NUM_THREADS", "RANK",
        "MASTER_PORT",
    }  # fmt: skip
    assert allowed(site | dict.fromkeys(refused, "x")) == site
