"""The docker box without an Engine: which image it takes, what it refuses, and the command line that it makes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_engine
from syrupy.assertion import SnapshotAssertion

from harness import backends, boxes, launch, pipeline, session
from harness.backends import container, outside
from harness.boxes import docker
from harness.boxes.docker import DockerBox
from harness.errors import HarnessError
from harness.schema import Job, Mount, ServeCase, TrainCase

TINY = TrainCase(variant="tiny-hybrid", method="lora", seq_len=64, device="cpu", lora_targets=("in_proj",))
TWO_GPUS = TrainCase(
    variant="nano-9b-v2", method="lora", seq_len=2048, lora_targets=("in_proj",), devices=2, strategy="ddp"
)
SERVE = ServeCase(variant="nano-9b-v2", weights="hub")
RUN = Path("/runs/nightly")


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without settings of a site."""
    for name in list(os.environ):
        if name.startswith((*docker.SITE, "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DOCKER_HOST", "unix:///run/docker.sock")


@pytest.fixture
def ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A checkout whose images the Engine has."""
    found = fake_engine.lock(tmp_path)
    fake_engine.install(monkeypatch, found.values())
    return found


def wrapped(root: Path, job: Job, run: Path = RUN) -> tuple[str, ...]:
    return DockerBox(root).wrap(job, run / "jobs" / f"{job.id}.1", run / "payload").argv


def text(argv: tuple[str, ...]) -> str:
    """One option a line, and nothing of this host."""
    here = {f"--user {os.getuid()}:{os.getgid()}": "--user UID:GID", os.uname().nodename: "HOST"}
    found = " ".join([Path(argv[0]).name, *argv[1:]]).replace(" --", "\n--")
    for mine, anyones in here.items():
        found = found.replace(mine, anyones)
    return found


def job(case: Any, **changed: Any) -> Job:
    (made,) = launch.jobs((case,), 1)
    env = made.env | changed.pop("env", {})
    return made.model_copy(update=changed | {"env": env})


def option(argv: tuple[str, ...], name: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == name]


def variables(argv: tuple[str, ...]) -> dict[str, str]:
    return dict(value.split("=", 1) for value in option(argv, "--env") if "=" in value)


# ---------------------------------------------------------------- the command line


def test_command_of_a_case_on_a_cpu(tmp_path: Path, ids: dict[str, str], snapshot: SnapshotAssertion) -> None:
    assert text(wrapped(tmp_path, job(TINY, host_memory_gib=1.5))) == snapshot


def test_command_of_a_case_on_two_gpus(tmp_path: Path, ids: dict[str, str], snapshot: SnapshotAssertion) -> None:
    given = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "3,5"}
    mounts = (Mount(path="/data/a,b.jsonl"), Mount(path="/models/nano"))
    assert text(wrapped(tmp_path, job(TWO_GPUS, env=given, mounts=mounts))) == snapshot


def test_a_case_on_gpus_gets_those_it_was_given_and_a_case_on_a_cpu_none(tmp_path: Path, ids: dict[str, str]) -> None:
    some = wrapped(tmp_path, job(TWO_GPUS, env={"CUDA_VISIBLE_DEVICES": "3,5"}))
    assert option(some, "--gpus") == ['"device=3,5"']
    assert variables(some)["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert option(wrapped(tmp_path, job(TWO_GPUS)), "--gpus") == ['"device=0,1"']
    none = wrapped(tmp_path, job(TINY))
    assert option(none, "--gpus") == []
    assert (variables(none)["CUDA_VISIBLE_DEVICES"], variables(none)["NVIDIA_VISIBLE_DEVICES"]) == ("", "void")


def test_the_run_directory_alone_can_be_written_to(tmp_path: Path, ids: dict[str, str]) -> None:
    made = job(TINY, mounts=(Mount(path="/models/nano"),))
    argv = wrapped(tmp_path, made)
    mounts = option(argv, "--mount")
    assert [mount for mount in mounts if not mount.endswith(",readonly")] == [f"type=bind,source={RUN},target={RUN}"]
    assert f"type=bind,source={RUN}/payload,target={RUN}/payload,readonly" in mounts
    assert "type=bind,source=/models/nano,target=/models/nano,readonly" in mounts
    assert "--read-only" in argv
    paths = [value for name, value in variables(argv).items() if name in docker.CACHES]
    assert len(paths) == len(docker.CACHES)
    assert all(Path(path).is_relative_to(RUN) for path in paths)


def test_fetched_weights_are_mounted_for_who_asks_for_them(
    tmp_path: Path, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    argv = wrapped(tmp_path, job(SERVE))
    assert f"type=bind,source={tmp_path},target={tmp_path},readonly" in option(argv, "--mount")
    assert variables(argv)["HF_HUB_CACHE"] == str(tmp_path)
    assert "HF_HUB_CACHE" not in variables(wrapped(tmp_path, job(TINY)))


def test_the_network_is_off_but_for_a_job_about_an_interface(tmp_path: Path, ids: dict[str, str]) -> None:
    assert option(wrapped(tmp_path, job(TWO_GPUS)), "--network") == ["none"]
    alone = job(TWO_GPUS, env={"GLOO_SOCKET_IFNAME": "lo"})
    assert option(wrapped(tmp_path, alone), "--network") == ["none"]
    about = job(TWO_GPUS, env={"NCCL_SOCKET_IFNAME": "ib0"})
    assert option(wrapped(tmp_path, about), "--network") == ["host"]


def test_settings_of_the_site_pass_where_they_mean_the_same_inside(
    tmp_path: Path, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    for name in ("NCCL_SOCKET_IFNAME", "NCCL_TOPO_FILE", "TORCH_HOME", "LD_PRELOAD", "CUDA_HOME", "NVIDIA_API_KEY"):
        monkeypatch.setenv(name, "of-the-host")
    argv = wrapped(tmp_path, job(TINY))
    assert variables(argv)["NCCL_P2P_DISABLE"] == "1"
    assert "of-the-host" not in " ".join(argv)


def test_the_client_gets_what_it_needs_to_find_its_engine(
    tmp_path: Path, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMETHING", "else")
    command = DockerBox(tmp_path).wrap(job(TINY), RUN / "jobs/a.1", RUN / "payload")
    assert command.env["DOCKER_HOST"] == "unix:///run/docker.sock"
    assert set(command.env) <= docker.CLIENT


def test_the_container_can_be_ended_by_name_and_found_by_label(tmp_path: Path, ids: dict[str, str]) -> None:
    command = DockerBox(tmp_path).wrap(job(TINY), RUN / "jobs/a.1", RUN / "payload")
    (name,) = option(command.argv, "--name")
    assert command.cleanup[-1] == name
    assert Path(command.cleanup[-2]).samefile(container.__file__)
    assert f"{container.LABEL}={RUN}" in option(command.argv, "--label")
    assert outside.MARK in option(command.argv, "--env")
    elsewhere = DockerBox(tmp_path).wrap(job(TINY), Path("/runs/other/jobs/a.1"), RUN / "payload")
    assert option(elsewhere.argv, "--name") != [name]


def test_a_job_on_several_hosts_is_refused(tmp_path: Path, ids: dict[str, str]) -> None:
    with pytest.raises(HarnessError, match="spread over 2 hosts"):
        wrapped(tmp_path, job(TWO_GPUS, nodes=2))


# ---------------------------------------------------------------- which image


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_environment_is_the_image_of_the_lock(tmp_path: Path, ids: dict[str, str], device: Any) -> None:
    found = DockerBox(tmp_path).environment("train", device)
    assert (found.digest, found.pinned) == (ids[f"train-{device}"], True)
    assert (found.python, found.libraries) == ("3.11.2", {"torch": "2.13.0+cpu"})
    assert found.digest in wrapped(tmp_path, job(TINY if device == "cpu" else TWO_GPUS))


def test_a_build_beside_a_run_changes_nothing_for_its_later_jobs(tmp_path: Path, ids: dict[str, str]) -> None:
    box = DockerBox(tmp_path)
    before = box.environment("train").digest
    fake_engine.lock(tmp_path, image=f"sha256:{9:064x}")
    assert before in box.wrap(job(TINY), RUN / "jobs/a.1", RUN / "payload").argv


@pytest.mark.parametrize(
    ("has", "tags", "message"),
    [
        ([], {}, "this Engine does not have the train-cpu image of images/images.lock"),
        ([], {"harness-train:cpu": f"sha256:{7:064x}"}, "its harness-train:cpu is another, sha256:000000000000"),
    ],
    ids=["missing", "drifted"],
)
def test_an_image_that_is_not_the_one_of_the_lock_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: list[str], tags: dict[str, str], message: str
) -> None:
    fake_engine.lock(tmp_path)
    fake_engine.install(monkeypatch, has, tags)
    with pytest.raises(HarnessError, match=message) as caught:
        boxes.get("docker", tmp_path).environment("train")
    assert "harness build train --variant cpu" in str(caught.value.hint)


def test_requirements_that_changed_since_the_build_are_refused(tmp_path: Path, ids: dict[str, str]) -> None:
    (tmp_path / "images/train/cpu.txt").write_text("torch==9.9\n")
    with pytest.raises(HarnessError, match=r"images/train/cpu\.txt has changed since its image was built") as caught:
        DockerBox(tmp_path).environment("train")
    assert "harness build train --variant cpu" in str(caught.value.hint)
    assert DockerBox(tmp_path).environment("serve").digest == ids["serve-cpu"]


def test_without_any_build_the_command_that_makes_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no serve-cuda image") as caught:
        DockerBox(tmp_path).environment("serve", "cuda")
    assert "harness build serve --variant cuda" in str(caught.value.hint)


def test_an_engine_of_another_host_is_refused(
    tmp_path: Path, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://elsewhere:2376")
    with pytest.raises(HarnessError, match="another host"):
        DockerBox(tmp_path).environment("train")


# ---------------------------------------------------------------- the run around it

MATRIX = """
version: 1
name: both
defaults: {variant: tiny-hybrid, seq_len: 64}
train:
  - {method: lora, device: [cpu, cuda]}
"""


def test_one_run_directory_holds_numbers_of_one_image(
    tmp_path: Path, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(boxes.REGISTRY, "docker", lambda _: DockerBox(tmp_path))
    path = tmp_path / "both.yaml"
    path.write_text(MATRIX)
    with pytest.raises(HarnessError, match="on a CPU and on GPUs"):
        pipeline.run(path, session.Options(runs=tmp_path / "runs", box="docker"))


def test_a_memory_limit_needs_a_box_that_can_keep_it(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text(MATRIX)
    with pytest.raises(HarnessError, match="the box venv cannot limit a job's memory") as caught:
        pipeline.run(path, session.Options(runs=tmp_path / "runs", host_memory_gib=1.0))
    assert "--box docker" in str(caught.value.hint)


def test_a_cluster_wants_another_box(tmp_path: Path, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would remove the containers of a job that the scheduler ended."""
    cluster = type("Cluster", (), {"name": "slurm"})()
    monkeypatch.setattr(backends, "get", lambda _: cluster)
    monkeypatch.setitem(boxes.REGISTRY, "docker", lambda _: DockerBox(tmp_path))
    path = tmp_path / "both.yaml"
    path.write_text(MATRIX)
    with pytest.raises(HarnessError, match="--box docker does not go with --backend slurm") as caught:
        pipeline.run(path, session.Options(runs=tmp_path / "runs", backend="slurm:site.yaml", box="docker"))
    assert "pyxis" in str(caught.value.hint)


# ---------------------------------------------------------------- the end of a container


def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A `docker` on PATH that does what the script says."""
    path = tmp_path / "bin/docker"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\necho \"$@\" >> '{tmp_path}/asked'\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("""[ "$2" = rm ] || echo '{"OOMKilled": true}'""", {"host_oom_killed": True}),
        ("""[ "$2" = rm ] || echo '{"OOMKilled": false}'""", {"host_oom_killed": False}),
        ("echo 'Error: No such container: x' >&2; exit 1", {"host_oom_killed": False}),
        (
            "echo 'Cannot connect to the Docker daemon at unix:///x.' >&2; exit 1",
            {"interrupted": True, "detail": "the Docker Engine did not answer at its end: Cannot connect to the Docker "
             "daemon at unix:///x."},
        ),
        (
            """[ "$2" = rm ] && echo 'Error response: device is busy' >&2 && exit 1; echo '{"OOMKilled": true}'""",
            {"host_oom_killed": True,
             "detail": "the container x could not be removed: Error response: device is busy"},
        ),
    ],
    ids=["out of memory", "ended", "never was", "no Engine", "stuck"],
)  # fmt: skip
def test_what_is_seen_of_a_container_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: dict[str, object]
) -> None:
    client(tmp_path, monkeypatch, script)
    assert container.remove("x") == said
    assert json.loads(json.dumps(said)) == said


def test_every_container_of_a_run_directory_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client(tmp_path, monkeypatch, """[ "$2" = ls ] && echo "harness-a harness-b" || true""")
    assert container.remove_left(str(tmp_path)) == []
    assert not (tmp_path / "asked").exists()
    (tmp_path / "run.json").write_text('{"box": "docker"}')
    lines = container.remove_left(str(tmp_path))
    assert [line.split()[3].rstrip(",") for line in lines] == ["harness-a", "harness-b"]
    asked = (tmp_path / "asked").read_text()
    assert f"label=harness.run={tmp_path}" in asked
    assert "rm --force --volumes harness-b" in asked
