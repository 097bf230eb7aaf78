"""harness fetch against a hub on loopback, with the hub's own client of the training environment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import catalog, fetch, hub, pipeline, schema, session, store
from harness.errors import HarnessError
from harness.payload import fetch as inside
from harness.schema import Record
from tests.fakes.hub import Hub, serving

CHECKPOINT = "nvidia/NVIDIA-Nemotron-Nano-9B-v2"
COMMIT = "c" * 40
CONTENT = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": bytes(range(256)) * 4096}


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "remote"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    with serving(Hub(CHECKPOINT, folder)) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield found


def get(revision: str | None = None, to: Path | None = None) -> fetch.Fetched:
    return fetch.fetch("nano-9b-v2", revision, to, lambda line: None)


@pytest.mark.payload
def test_what_is_fetched_is_found_offline_under_its_commit(remote: Hub) -> None:
    found = get()
    size = sum(map(len, CONTENT.values()))
    assert (found.commit, found.files, found.bytes, found.fetched_bytes) == (COMMIT, 3, size, size)
    assert {path.name: path.read_bytes() for path in Path(found.path).iterdir()} == CONTENT
    assert hub.commit_of(CHECKPOINT, None) == COMMIT
    again = get()
    assert (again.path, again.fetched_bytes, len(remote.got("model.safetensors"))) == (found.path, 0, 1)


@pytest.mark.payload
def test_a_download_that_is_cut_goes_on_where_it_was(remote: Hub) -> None:
    whole = CONTENT["model.safetensors"] * 24  # more than what the client takes at once
    (remote.folder / "model.safetensors").write_bytes(whole)
    remote.cut_after["model.safetensors"] = 15_000_000
    assert (Path(get().path) / "model.safetensors").read_bytes() == whole
    first, second = remote.got("model.safetensors")
    assert first is None
    assert second is not None
    assert second.startswith("bytes=")
    assert int(second.removeprefix("bytes=").rstrip("-")) > 0


@pytest.mark.payload
def test_a_named_revision_is_what_hub_weights_then_mean_here(remote: Hub) -> None:
    remote.commit = "d" * 40
    get()
    remote.commit = COMMIT
    assert get("v2").commit == COMMIT
    assert hub.commit_of(CHECKPOINT, "v2") == hub.commit_of(CHECKPOINT, None) == COMMIT


@pytest.mark.payload
def test_into_a_folder_with_a_note_of_what_it_is(remote: Hub, tmp_path: Path) -> None:
    found = get(to=tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == CONTENT["model.safetensors"]
    note = json.loads((tmp_path / "model" / fetch.NOTE).read_text())
    assert (note["commit"], note["checkpoint"]) == (COMMIT, CHECKPOINT)
    assert found.path == str(tmp_path / "model")
    assert hub.commit_of(CHECKPOINT, None) is None


@pytest.mark.payload
@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        ((403, "GatedRepo"), f"{CHECKPOINT} is gated, and no token is set", "ask for access at"),
        ((401, "RepoNotFound"), "or shows it only to those who may see it", "HF_TOKEN"),
        ((404, "RevisionNotFound"), "has no revision 'main'", "a branch, a tag or a commit"),
        ((503, ""), "cannot be reached or broke off", "HTTPS_PROXY"),
    ],
)
def test_a_hub_that_refuses_gives_one_clear_message(
    remote: Hub, error: tuple[int, str], message: str, hint: str
) -> None:
    remote.error = error
    with pytest.raises(HarnessError) as refused:
        get()
    assert message in refused.value.message
    assert hint in refused.value.hint


@pytest.mark.payload
def test_a_hub_that_does_not_answer(remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HarnessError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        get()


@pytest.mark.payload
def test_the_token_comes_from_the_environment_alone_and_reaches_no_file(
    remote: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/token").write_text("hf_ofSomeOtherTool123")
    get()
    assert {authorization for *_, authorization in remote.asked} == {None}
    shutil.rmtree(tmp_path / "home")
    monkeypatch.setenv("HF_TOKEN", "hf_mySecretToken123456")
    get()
    assert ("Bearer hf_mySecretToken123456") in {authorization for *_, authorization in remote.asked}
    written = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if b"mySecretToken" in path.read_bytes()]


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(inside.NoSpace, match=r"17\.8 GB are to be fetched, 0\.0 GB are free at"):
        inside.check_space(17_800_000_000, tmp_path / "not" / "there")
    inside.check_space(0, tmp_path)


def test_a_variant_without_published_weights() -> None:
    with pytest.raises(HarnessError, match="tiny-hybrid has no published weights"):
        fetch.fetch("tiny-hybrid", None, None, lambda line: None)


def test_without_an_environment_it_says_what_to_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_ENVS", str(tmp_path))
    with pytest.raises(HarnessError) as refused:
        get()
    assert refused.value.hint == "make one with ./tools/setup train"


MATRIX = """\
version: 1
name: saved
defaults: {device: cpu, variant: VARIANT, seq_len: 64, micro_batch: 2, steps: 4, warmup_steps: 1}
train:
  - method: [lora]
    weights: WEIGHTS
"""


def run(tmp_path: Path, name: str, weights: str) -> Record:
    path = tmp_path / f"{name}.yaml"
    path.write_text(MATRIX.replace("VARIANT", "tiny-hybrid").replace("WEIGHTS", weights).replace("saved", name))
    result = pipeline.run(path, session.Options(runs=tmp_path / "runs", keep_artifacts=True))
    (record,) = result.records
    assert record.status == "measured", record.last and record.last.diagnosis
    return record


@pytest.mark.payload
def test_a_fetched_model_trains_offline_from_the_cache_and_from_a_folder(
    remote: Hub, tmp_path: Path, environments: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model is saved, served as a hub's, fetched, and trained twice: as `hub` and as a path; equal losses."""
    save_tiny(remote.folder, environments)
    tiny = catalog.variant("tiny-hybrid").model_copy(update={"checkpoint": CHECKPOINT})
    monkeypatch.setattr(catalog, "variant", lambda name: tiny)
    found = fetch.fetch("tiny-hybrid", None, None, lambda line: None)
    copy = fetch.fetch("tiny-hybrid", None, tmp_path / "model", lambda line: None)
    remote.error = (503, "")
    asked = len(remote.asked)
    by_hub, by_path = run(tmp_path, "by-hub", "hub"), run(tmp_path, "by-path", copy.path)
    assert len(remote.asked) == asked
    assert by_hub.provenance is not None
    assert by_path.provenance is not None
    assert by_hub.provenance.weights == f"hub@{found.commit}"
    assert by_path.provenance.weights == "path"
    assert losses(by_hub) == losses(by_path)


def losses(record: Record) -> tuple[float | None, ...]:
    assert record.last is not None
    assert record.last.observation is not None
    return record.last.observation.ranks[0].steps.loss


def save_tiny(folder: Path, environments: Path) -> None:
    """A tiny model with its tokenizer, as a hub has it."""
    import subprocess

    variant = catalog.variant("tiny-hybrid")
    case = schema.TrainCase(
        variant="tiny-hybrid", device="cpu", devices=1, method="full", strategy="none", seq_len=64, micro_batch=2,
        grad_accum=1, steps=4, warmup_steps=1, param_dtype="fp32", attention="sdpa",
    )  # fmt: skip
    shutil.rmtree(folder)
    code = (
        "import json, sys; from pathlib import Path; from harness.payload import model, tokenizer\n"
        "case, variant, to = json.loads(sys.argv[1])\n"
        "model.build(case, variant, 'cpu').save_pretrained(to); tokenizer.build(variant).save_pretrained(to)"
    )
    asked = json.dumps([case.model_dump(mode="json"), variant.payload(), str(folder)])
    python = str(environments / "train/bin/python")
    subprocess.run([python, "-c", code, asked], check=True, timeout=120, env={"PYTHONPATH": str(store_root())})


def store_root() -> Path:
    return Path(store.__file__).resolve().parent.parent
