"""Sites, scripts and Slurm's words without any Slurm; the fake of its programs for what has to happen in time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import slurm_sites, stub_box, stub_jobs
from fakes.stub_run import MATRIX, failure, status
from hypothesis import given
from hypothesis import strategies as st
from syrupy.assertion import SnapshotAssertion

from harness import backends, boxes, launch, pipeline, store
from harness.backends.slurm import client, outcome, script, site
from harness.boxes import imagefile
from harness.errors import HarnessError
from harness.schema import ServeCase, Ticket, TrainCase
from harness.session import Options

ROOT = Path(__file__).resolve().parent.parent
DIGEST = "sha256:" + "1" * 64
TRAIN = TrainCase(variant="nano-9b-v2", method="lora", seq_len=2048, lora_targets=("in_proj",))
WIDE = TRAIN.model_copy(update={"strategy": "fsdp", "devices": 16, "nodes": 2})
SERVE = ServeCase(variant="nano-9b-v2", tensor_parallel=2)
CLUSTER = site.Site(version=1, runs="/shared/runs", partition="h100", account="bench", qos="normal",
                    constraint="nvlink", nodes=4, gpus_per_node=8, gpu_request="gpus-per-node", gpu_type="h100",
                    cpus_per_device=12, memory_per_node="900G", exclusive=True, scratch="/raid",
                    environment=("module load cuda",), network={"NCCL_SOCKET_IFNAME": "ib0"},
                    exclude_nodes=("bad1",))  # fmt: skip


def ordered(case: TrainCase | ServeCase, place: site.Site, box: boxes.Box, **more: object) -> str:
    """The script of a case."""
    (job,) = launch.jobs((case,), 1)
    folder = Path("/shared/runs/a-run/jobs") / f"{job.id}.1"
    command = box.wrap(job, folder, Path("/shared/runs/a-run/payload"))
    backend = backends.get("local")
    assert backend
    from harness.backends.slurm.backend import _container, _exported

    container, argv = _container(command.argv)
    return script.text(script.Order(job=job, argv=argv, env=_exported(command.env), container=container,
                                    job_dir=str(folder), name=f"{job.id}.1-0", site=place, **more))  # type: ignore[arg-type]  # fmt: skip


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine reaches a snapshot."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("HARNESS_ENVS", "/shared/envs")
    monkeypatch.setenv("HARNESS_PYTHON", "/bin/sh")
    monkeypatch.delenv("PYTHONPATH", raising=False)


IMAGES = {"train": f"reg#train@{DIGEST}", "serve": "/images/serve.sif"}


@pytest.mark.parametrize("runtime", ["venv", "apptainer", "pyxis"])
@pytest.mark.parametrize("case", [TRAIN, WIDE, SERVE], ids=["train", "two-nodes", "serve"])
def test_the_script_of_each_runtime(
    runtime: str, case: TrainCase | ServeCase, bare: None, snapshot: SnapshotAssertion
) -> None:
    box = boxes.of_site(runtime, IMAGES, ("/models",))  # type: ignore[arg-type]
    text = ordered(case, CLUSTER, box)
    assert text == snapshot
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""


def test_a_script_that_a_word_could_break_is_quoted(bare: None) -> None:
    job = stub_jobs.job("odd").model_copy(update={"argv": ("python", "it's $HOME", "a{head}$(id)b"), "nodes": 2})
    text = script.text(script.Order(job=job, argv=job.argv, env={"X": "a'b$c"}, job_dir="/a b/jobs/odd.1", name="odd",
                                    site=CLUSTER))  # fmt: skip
    assert "python 'it'\"'\"'s $HOME' \"a$HARNESS_HEAD\\$(id)b\"" in text
    assert "export X='a'\"'\"'b$c'" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""


@pytest.mark.parametrize(
    ("request_", "directive"), [("gres", "--gres=gpu:h100:8"), ("gpus-per-node", "--gpus-per-node=h100:8")]
)
def test_gpus_are_asked_for_as_the_site_says(request_: str, directive: str, bare: None) -> None:
    text = ordered(WIDE, CLUSTER.model_copy(update={"gpu_request": request_}), boxes.get("found"))
    assert f"#SBATCH {directive}\n" in text
    cpu = WIDE.model_copy(update={"device": "cpu"})
    assert "gpu" not in ordered(cpu, CLUSTER, boxes.get("found")).split("job_dir=")[0]


def test_excluded_nodes_stand_in_one_directive(bare: None) -> None:
    assert "#SBATCH --exclude=bad1,n7\n" in ordered(TRAIN, CLUSTER, boxes.get("found"), exclude=("n7", "bad1"))


# ---------------------------------------------------------------- sites


@pytest.mark.parametrize("path", sorted((ROOT / "matrices/sites").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_sites_and_name_every_key_between_them(path: Path) -> None:
    assert site.load(str(path)).version == 1
    texts = "".join(one.read_text() for one in path.parent.glob("*.yaml"))
    known = set(site.Site.model_fields) - {"lost_after_s"}
    assert {name for name in known if f"{name}:" not in texts} == set()


@pytest.mark.parametrize(
    ("lines", "where", "said"),
    [
        ("runs: /a\npartion: x\n", 3, "did you mean partition?"),
        ("runs: relative\n", 2, "runs"),
        ("runs: /a\nruntime: pyxis\n", 3, "needs an image"),
        ("runs: /a\nimages: {train: /x.sif}\n", 3, "uses no image"),
        ("runs: /a\ngpus_per_node: 8\n", 3, "how the GPUs are requested"),
        ("runs: /a\nnetwork: {HF_TOKEN: x}\n", 3, "no variable of the network"),
        ("runs: /a\npartition: a b\n", 3, "partition"),
        ("runs: /a\nmax_queued: 0\n", 3, "max_queued"),
        ("runs: /a\nmax_queued: '4'\n", 3, "max_queued"),
        ("runs: /a\n  bad: x\n", 3, ""),
    ],
)
def test_a_mistake_in_a_site_file_is_named_with_its_line(tmp_path: Path, lines: str, where: int, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"version: 1\n{lines}")
    with pytest.raises(HarnessError) as caught:
        site.load(str(path))
    assert f"mine.yaml:{where}:" in caught.value.message
    assert said in caught.value.message


def test_a_site_is_found_by_name_in_the_user_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "harness/sites").mkdir(parents=True)
    (tmp_path / "harness/sites/alps.yaml").write_text("version: 1\nruns: /a\n")
    assert site.load("alps").runs == "/a"
    with pytest.raises(HarnessError, match="did you mean alps"):
        site.load("alpes")
    with pytest.raises(HarnessError, match="needs a site"):
        backends.get("slurm")


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        (WIDE, {"nodes": 1}, "needs 2 nodes"),
        (WIDE, {"gpus_per_node": 4}, "needs 8 GPUs on a node"),
        (WIDE.model_copy(update={"device": "cpu"}), {"cpus_per_node": 4}, "needs 8 ranks on a node"),
        (TRAIN, {"max_time_limit_s": 60.0}, "may take 3600 s"),
        (WIDE, {}, None),
    ],
)
def test_what_a_site_cannot_give_is_refused_with_the_reason(
    case: TrainCase, change: dict[str, object], reason: str | None
) -> None:
    from harness.backends.slurm import Slurm

    (job,) = launch.jobs((case,), 1)
    said = Slurm(CLUSTER.model_copy(update=change), "here").lacking(job)
    assert said is None if reason is None else reason in str(said)


# ---------------------------------------------------------------- images


def test_an_image_is_named_by_digest_or_is_a_file(tmp_path: Path) -> None:
    assert imagefile.digest(f"reg#x@{DIGEST}") == DIGEST
    file = tmp_path / "x.sif"
    file.write_bytes(b"image")
    assert imagefile.digest(str(file)) == "sha256:6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d"
    for wrong in ("reg#x:latest", str(tmp_path / "absent.sif")):
        with pytest.raises(HarnessError):
            imagefile.digest(wrong)


def test_apptainer_gets_an_argv_that_it_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake on PATH that takes apptainer's options apart and starts what is left."""
    fake = tmp_path / "bin/apptainer"
    fake.parent.mkdir()
    fake.write_text(f"""#!{sys.executable}
import argparse, json, os, sys
parser = argparse.ArgumentParser()
parser.add_argument("verb", choices=["exec"])
parser.add_argument("--no-home", action="store_true"); parser.add_argument("--nv", action="store_true")
parser.add_argument("--bind", action="append"); parser.add_argument("--pwd")
parser.add_argument("image"); parser.add_argument("argv", nargs=argparse.REMAINDER)
asked = parser.parse_args()
json.dump(vars(asked), open(os.path.join(asked.pwd, "asked.json"), "w"))
os.chdir(asked.pwd)
os.execv(sys.executable, [sys.executable, *asked.argv[1:]])
""")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    folder = stub_jobs.job_dir(tmp_path, stub_jobs.job())
    job = stub_jobs.job().model_copy(
        update={"device": "cuda", "argv": ("python", "-S", str(stub_jobs.STUB), "launcher", "0")}
    )
    box = boxes.of_site("apptainer", {"train": "/images/train.sif"}, ("/models",))
    command = box.wrap(job, folder, ROOT)
    backend = backends.get("local")
    ticket = backend.submit(job, command, folder)
    stub_jobs.wait_for(lambda: backend.poll([ticket]))
    assert backend.collect(ticket).ok
    asked = json.loads((folder / "asked.json").read_text())
    assert (asked["nv"], asked["image"], asked["pwd"]) == (True, "/images/train.sif", str(folder))
    assert asked["bind"] == [f"{ROOT.parent}:{ROOT.parent}", "/models:/models"]


def test_pyxis_gets_options_that_it_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake srun refuses any other option, and starts what stands behind them."""
    fake = Fake(tmp_path, monkeypatch)
    (fake.state.parent / "bin/python").symlink_to(sys.executable)
    job = stub_jobs.job()
    folder = stub_jobs.job_dir(fake.run_dir, job)
    box = boxes.of_site("pyxis", {"train": f"reg#train@{DIGEST}"}, ("/models",))
    ticket = fake.backend.submit(job, box.wrap(job, folder, ROOT), folder)
    assert fake.ended(ticket).ok
    asked = json.loads((fake.state / "container.json").read_text())
    assert asked["container-image"] == f"reg#train@{DIGEST}"
    assert asked["container-mounts"] == f"{ROOT.parent}:{ROOT.parent},/models:/models"
    assert asked["container-workdir"] == str(folder)


# ---------------------------------------------------------------- Slurm's words

QUEUE = """\
12|RUNNING|0|n[1-2]|None|a-1|
13|CANCELLED|0|n1|None|b-2|
14|FAILED|256|n2|NonZeroExitCode|c-3|
15|PENDING|0||Priority|d-4|
"""
ACCOUNTS = """\
21|COMPLETED|0:0|n1|a
21.batch|COMPLETED|0:0|n1|batch
22|CANCELLED by 1000|0:15|n[1-2]|b
23|FAILED|1:0|n2|c
23.0|OUT_OF_MEMORY|0:125|n2|bash
24|NODE_FAIL|0:0|n2|d
"""


def test_the_queue_and_accounting_are_read() -> None:
    queue = client.parse_queue(QUEUE)
    assert {job: (seen.state, seen.exit_code, seen.nodes) for job, seen in queue.items()} == {
        "12": ("RUNNING", 0, "n[1-2]"),
        "13": ("CANCELLED", 0, "n1"), "14": ("FAILED", 1, "n2"), "15": ("PENDING", 0, ""),
    }  # fmt: skip
    accounts = client.parse_accounting(ACCOUNTS)
    assert {job: (seen.state, seen.out_of_memory) for job, seen in accounts.items()} == {
        "21": ("COMPLETED", False), "22": ("CANCELLED", False), "23": ("FAILED", True), "24": ("NODE_FAIL", False),
    }  # fmt: skip


@given(cut=st.integers(0, max(len(QUEUE), len(ACCOUNTS))))
def test_output_cut_anywhere_never_says_what_slurm_did_not(cut: int) -> None:
    whole, accounted = client.parse_queue(QUEUE), client.parse_accounting(ACCOUNTS)
    for job, seen in client.parse_queue(QUEUE[:cut]).items():
        assert seen.state == whole[job].state
    for job, seen in client.parse_accounting(ACCOUNTS[:cut]).items():
        assert seen.state == accounted[job].state


@given(text=st.text())
def test_any_output_is_read_or_left_out(text: str) -> None:
    client.parse_queue(text)
    client.parse_accounting(text)


def ends(folder: Path, state: str | None, ended: str = "", *, oom: bool = False, ours: bool = False) -> outcome.Outcome:
    folder.mkdir(exist_ok=True)
    (folder / "started.txt").write_text("7 n1 100.5\n")
    for name, text in (("ended.txt", ended), (outcome.CANCELLED_FILE, "1" if ours else "")):
        (folder / name).unlink(missing_ok=True)
        if text:
            (folder / name).write_text(text)
    ticket = Ticket(backend="slurm", job_id="a", job_dir=str(folder), submitted_at=99.0, handle={"job": "7"})
    seen = None if state is None else client.Seen(state=state, exit_code=None, out_of_memory=oom)
    return outcome.judge(ticket, seen, ("n1",), ())


FLAGS = ("timed_out", "stalled", "host_oom_killed", "interrupted", "lost", "node_failed", "preempted", "cancelled")


@pytest.mark.parametrize(
    ("state", "ended", "more", "flag", "code"),
    [
        ("COMPLETED", "ended 0 200.0", {}, None, 0),
        (None, "ended 0 200.0", {}, None, 0),
        ("FAILED", "ended 3 200.0", {}, None, 3),
        ("FAILED", "ended 1 200.0", {"oom": True}, "host_oom_killed", 1),
        ("OUT_OF_MEMORY", "", {}, "host_oom_killed", None),
        ("TIMEOUT", "", {}, "timed_out", None),
        ("DEADLINE", "", {}, "timed_out", None),
        ("FAILED", "time_limit 143 200.0", {}, "timed_out", None),
        ("FAILED", "stalled 143 200.0", {}, "stalled", None),
        ("NODE_FAIL", "", {}, "node_failed", None),
        ("BOOT_FAIL", "", {}, "node_failed", None),
        ("PREEMPTED", "terminated 143 200.0", {}, "preempted", None),
        ("CANCELLED", "terminated 143 200.0", {}, "cancelled", None),
        ("CANCELLED", "", {"ours": True}, "interrupted", None),
        (None, "terminated 143 200.0", {}, "cancelled", None),
        (None, "", {}, "lost", None),
        (None, "", {"ours": True}, "interrupted", None),
    ],
)
def test_each_end_has_a_word_of_its_own(
    tmp_path: Path, state: str | None, ended: str, more: dict[str, bool], flag: str | None, code: int | None
) -> None:
    found = ends(tmp_path / "a", state, ended, **more)
    assert [name for name in FLAGS if getattr(found, name)] == ([flag] if flag else [])
    assert found.exit_code == code
    assert found.ok == (code == 0)
    assert (found.scheduler_state, found.scheduler_job, found.hosts) == (state, "7", ("n1",))


@given(cut=st.integers(0, 30))
def test_a_word_of_the_script_that_was_cut_is_none(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = "time_limit 124 1234567890.5\n"
    (folder / "ended.txt").write_text(whole[:cut])
    found = outcome.ended(folder)
    assert found is None or (found.how, found.exit_code) == ("time_limit", 124)


# ---------------------------------------------------------------- with the fake


class Fake:
    """A run on the fake cluster."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, more: str = "accounting: false\n") -> None:
        self.state = slurm_sites.fake(folder, monkeypatch)
        self.site = slurm_sites.write(folder / "shared", "max_queued: 3\n" + more)
        quick = (
            self.site.read_text().replace("lost_after_s: 4", "lost_after_s: 1").replace("poll_s: 0.5", "poll_s: 0.2")
        )
        self.site.write_text(quick)
        self.run_dir = folder / "shared" / "small"
        self.backend = backends.get(f"slurm:{self.site}")

    def submit(self, name: str = "a-job", **stub: object) -> Ticket:
        job = stub_jobs.job(name, **stub)
        folder = stub_jobs.job_dir(self.run_dir, job)
        return self.backend.submit(job, stub_jobs.command(job, folder), folder)

    def calls(self) -> list[str]:
        return (self.state / "calls").read_text().split()

    def ended(self, ticket: Ticket) -> outcome.Outcome:
        stub_jobs.wait_for(lambda: self.backend.poll([ticket]))
        return self.backend.collect(ticket)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path, monkeypatch)


def test_an_answer_that_got_lost_is_not_asked_for_twice(fake: Fake) -> None:
    (fake.state / "lose-answer").touch()
    ticket = fake.submit()
    assert fake.ended(ticket).ok
    assert len(list(fake.state.glob("jobs/*.json"))) == 1


def test_a_crash_between_submission_and_ticket_is_found_again_by_name(fake: Fake) -> None:
    ticket = fake.submit(steps=20, step_s=0.1)
    folder = Path(ticket.job_dir)
    (folder / "ticket.json").unlink()
    (folder / "started.txt").unlink(missing_ok=True)
    again = backends.get(f"slurm:{fake.site}")
    lines = again.adopt(fake.run_dir)
    assert "found again" in lines[0]
    found = Ticket.model_validate_json((folder / "ticket.json").read_text())
    assert found.handle["job"] == ticket.handle["job"]
    fake.backend = again
    assert fake.ended(found).ok


def test_a_submission_that_slurm_never_saw_is_left_for_a_new_attempt(fake: Fake) -> None:
    ticket = fake.submit()
    assert fake.ended(ticket).ok
    for name in ("ticket.json", "outcome.json", "started.txt", "ended.txt"):
        (Path(ticket.job_dir) / name).unlink()
    (fake.state / "gone").touch()
    assert backends.get(f"slurm:{fake.site}").adopt(fake.run_dir) == []
    assert not (Path(ticket.job_dir) / "ticket.json").exists()


def test_a_silent_controller_loses_no_job(fake: Fake) -> None:
    ticket = fake.submit(steps=3)
    (fake.state / "down").touch()
    began = time.monotonic()
    while time.monotonic() - began < 2:  # longer than lost_after_s
        assert fake.backend.poll([ticket]) == set()
        time.sleep(0.2)
    (fake.state / "down").unlink()
    assert fake.ended(ticket).ok


def test_without_accounting_the_script_s_own_word_stands(fake: Fake) -> None:
    ticket = fake.submit(exit_code=3)
    (fake.state / "gone").touch()
    found = fake.ended(ticket)
    assert (found.exit_code, found.scheduler_state, found.lost) == (3, None, False)
    assert "sacct" not in fake.calls()


def test_a_job_that_nobody_knows_is_lost_after_a_while(fake: Fake) -> None:
    ticket = fake.submit(hang_at_step=1)
    stub_jobs.wait_for((Path(ticket.job_dir) / "started.txt").exists)
    number = ticket.handle["job"]
    subprocess.run([fake.state.parent / "bin/scancel", number], check=True)
    stub_jobs.wait_for(lambda: "CANCELLED" in (fake.state / f"jobs/{number}.json").read_text())
    (Path(ticket.job_dir) / "ended.txt").unlink(missing_ok=True)
    (fake.state / "gone").touch()
    assert fake.ended(ticket).lost


def test_many_jobs_are_watched_by_one_call_at_a_time(fake: Fake) -> None:
    tickets = [fake.submit(f"job-{number}", steps=2) for number in range(6)]
    before = len(fake.calls())
    began = time.monotonic()
    stub_jobs.wait_for(lambda: len(fake.backend.poll(tickets)) == 6)
    looks = fake.calls()[before:].count("squeue")
    assert looks <= (time.monotonic() - began) / 0.2 + 2
    assert "sacct" not in fake.calls()


MANY = MATRIX + "train:\n  - {method: [lora, full], seq_len: [64, 128], learning_rate: [1.0e-4, 2.0e-4]}\n"


def run(fake: Fake, text: str, monkeypatch: pytest.MonkeyPatch, *behaviour: tuple[str, dict[str, object]],
        backend: str = "slurm") -> pipeline.Result:  # fmt: skip
    monkeypatch.setitem(boxes.REGISTRY, "stub", lambda _: stub_box.StubBox(behaviour))
    path = fake.site.with_name("small-matrix.yaml")
    path.write_text(text)
    return pipeline.run(path, Options(runs=fake.run_dir.parent, backend=f"{backend}:{fake.site}", box="stub"))


def test_no_more_jobs_are_queued_than_the_site_allows(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(fake, MANY.replace("[64, 128]", "64"), monkeypatch, ("*", {"step_s": 0.1}))
    assert status(result.records) == {"measured": 4}
    ends_ = [
        outcome.Outcome.model_validate_json(path.read_bytes()) for path in fake.run_dir.glob("jobs/*/outcome.json")
    ]
    moments = sorted([(one.start, 1) for one in ends_] + [(one.end, -1) for one in ends_])
    most = at_once = 0
    for _, change in moments:
        at_once += change
        most = max(most, at_once)
    assert most <= 3


def test_a_case_that_needs_more_nodes_than_there_are_is_a_skip_with_the_reason(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = MATRIX + "train:\n  - {method: lora, seq_len: 64, strategy: ddp, devices: 4, nodes: [2, 4]}\n"
    records = run(fake, text, monkeypatch).records
    assert {record.case.nodes: record.skip_reason for record in records} == {
        2: None, 4: "needs 4 nodes; the site gives a job at most 2"}  # fmt: skip
    path = tmp_path / "local.yaml"
    path.write_text(text.replace("name: small", "name: local"))
    here = pipeline.run(path, Options(runs=tmp_path, box="stub")).records
    assert all("use --backend slurm" in str(record.skip_reason) for record in here)


def test_a_run_directory_that_the_nodes_do_not_see_is_refused(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(HarnessError, match="does not lie below"):
        fake.backend.adopt(tmp_path / "elsewhere")


CHAIN = (
    MATRIX
    + """\
train:
  - {method: lora, seq_len: 64}
chain:
  - train: {method: lora, seq_len: 64}
    serve: {adapter: adapter, load: {concurrency: 1, input_len: 8, output_len: 8, requests: 2}}
"""
)


def test_an_export_is_submitted_by_hand_and_its_results_are_collected(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(fake, CHAIN, monkeypatch, backend="export").records == ()
    assert "rsync" in (fake.run_dir / "README.md").read_text()
    assert not (fake.state / "calls").exists()  # nothing was asked of Slurm
    for half in ("train", "serve"):
        subprocess.run(["sh", fake.run_dir / "submit.sh"], check=True)
        scripts = list(fake.run_dir.glob("jobs/*/job.sbatch"))
        stub_jobs.wait_for(lambda there=scripts: all((path.parent / "ended.txt").exists() for path in there))
        records = run(fake, CHAIN, monkeypatch, backend="export").records
        assert status(records)["measured"] == (1 if half == "train" else 2)
    assert [failure(record) for record in records] == [None, None]
    assert store.Run(fake.run_dir).records()[0].last
