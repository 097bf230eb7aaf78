"""Building and verifying images, on an Engine of plain values: what is refused, what is handed over, what is noted."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests

from harness.containers import build, bundle, context, engine, imagelock, probe, requirements, verify, wheelhouse
from harness.containers.build import Request
from harness.containers.requirements import Requirement
from harness.errors import HarnessError
from tests.fakes.engine import FakeEngine, installed

BASE, BUILD_BASE, IMAGE = (f"sha256:{letter * 64}" for letter in "abc")
WHEELS = {"torch": "2.13.0+cpu", "trl": "1.16.0"}
REQUEST = Request(environment="train", variant="cpu")


def wheel_name(name: str, version: str) -> str:
    return f"{name}-{version}-py3-none-any.whl"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a lock of two packages, whose wheels lie in a folder that an installer of ours knows."""
    index = tmp_path / "index"
    index.mkdir()
    lock = ""
    for name, version in WHEELS.items():
        content = f"wheel of {name}".encode()
        (index / wheel_name(name, version)).write_bytes(content)
        lock += f"{name}=={version} \\\n    --hash=sha256:{sha256(content)}\n    # via x\n"
    checkout = tmp_path / "checkout"
    files = {
        "images/train/Containerfile": "FROM ${BASE}\n", "images/train/cpu.in": "torch\n", "images/train/cpu.txt": lock,
        "images/train/cuda.txt": "", "images/build/tools.txt": "", "images/build/install.sh": "true\n",
        "images/base/packages.lock": f"# list\nepoch 1\nbase {BASE}\nbuild {BUILD_BASE}\n",
    }  # fmt: skip
    for name, text in files.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    uv = tmp_path / "uv"
    uv.write_text(f"#!{sys.executable} -IS\n{FAKE_UV}")
    uv.chmod(0o755)
    monkeypatch.setattr(wheelhouse, "uv_program", lambda: str(uv))
    monkeypatch.setattr(wheelhouse, "pip_settings", lambda: {"find-links": str(index)})
    return checkout


FAKE_UV = """
import hashlib, pathlib, sys
links = next((a.split("=", 1)[1] for a in sys.argv if a.startswith("--find-links=")), None)
out = open(sys.argv[sys.argv.index("-o") + 1], "w")
for line in open(sys.argv[-1]):
    if line.strip():
        name, version = line.split(" ;")[0].strip().split("==")
        file = pathlib.Path(links) / f"{name}-{version}-py3-none-any.whl"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        out.write(f'[[packages]]\\nname = "{name}"\\nversion = "{version}"\\n')
        out.write(f'wheels = [{{ url = "{file.as_uri()}", hashes = {{ sha256 = "{digest}" }} }}]\\n')
"""


@pytest.fixture
def fake() -> FakeEngine:
    found = FakeEngine({BASE: {"Id": BASE}, BUILD_BASE: {"Id": BUILD_BASE}})
    found.says = [{"stream": "Step 1/1 : FROM base\n"}, {"aux": {"ID": IMAGE}}]
    found.answer = lambda argv: (0, installed(WHEELS), "")
    return found


def quiet(line: str) -> None:
    """Say nothing."""


def do_build(root: Path, fake: FakeEngine, request: Request = REQUEST) -> build.Built:
    return build.build(request, root, quiet, fake)  # type: ignore[arg-type]


# ---------------------------------------------------------------- locks


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("trl==1.16.0", "trl has no sha256"),
        ("trl==1.16.0 --hash=md5:0", "trl has no sha256"),
        ("trl==1.16.0 --hash=sha256:abc", "trl has no sha256"),
        (f"trl>=1.16.0 --hash=sha256:{'0' * 64}", "trl is not pinned"),
        (f"trl==1.* --hash=sha256:{'0' * 64}", "trl is not pinned"),
        (f"trl @ https://example.org/trl.whl --hash=sha256:{'0' * 64}", "trl is not pinned"),
        ("-r other.txt", "-r is not pinned"),
    ],
)
def test_a_requirement_that_is_not_pinned_by_hash_is_refused_by_name(
    root: Path, fake: FakeEngine, line: str, says: str
) -> None:
    lock = root / "images/train/cpu.txt"
    lock.write_text(f"# a comment\n{lock.read_text()}{line}\n")
    with pytest.raises(HarnessError) as refused:
        do_build(root, fake)
    assert says in refused.value.message
    assert f"{lock}:8:" in refused.value.message
    assert not fake.builds


def test_a_lock_is_read_with_markers_and_continued_lines(tmp_path: Path) -> None:
    path = tmp_path / "lock.txt"
    path.write_text(
        f"Hf_Xet==1.8.0 ; python_version < '3.12' \\\n    --hash=sha256:{'1' * 64} \\\n    --hash=sha256:{'2' * 64}\n"
        f"    # via a\nxgrammar[extra]==1.0 \\\n    --hash=sha256:{'3' * 64}\n"
    )
    assert requirements.read(path) == (
        Requirement(name="hf-xet", version="1.8.0", marker="python_version < '3.12'",
                    hashes=frozenset({"1" * 64, "2" * 64})),
        Requirement(name="xgrammar", version="1.0", marker="", hashes=frozenset({"3" * 64})),
    )  # fmt: skip


# ---------------------------------------------------------------- wheels


def test_one_hash_changed_makes_build_refuse_with_the_packages_name(root: Path, fake: FakeEngine) -> None:
    lock = root / "images/train/cpu.txt"
    first = sha256(b"wheel of trl")
    lock.write_text(lock.read_text().replace(first, "0" * 64))
    with pytest.raises(HarnessError, match=r"no hash of trl 1\.16\.0 is that of trl-1\.16\.0-py3-none-any\.whl"):
        do_build(root, fake)
    assert not fake.builds
    assert not (root / "images/images.lock").exists()


def test_what_is_here_is_not_asked_for_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = root / "images/train/cpu.txt"
    first = wheelhouse.gather(lock, root / ".wheels", quiet)
    shutil.rmtree(tmp_path / "index")
    monkeypatch.setattr(wheelhouse, "uv_program", lambda: pytest.fail("the index was asked"))
    again = wheelhouse.gather(lock, root / ".wheels", quiet)
    assert again == first
    assert [again.path(file).read_bytes() for file in again.files] == [b"wheel of torch", b"wheel of trl"]


def test_a_wheel_that_changed_on_disk_is_refused_by_name(root: Path, fake: FakeEngine) -> None:
    house = wheelhouse.gather(root / "images/train/cpu.txt", root / ".wheels", quiet)
    house.path(house.files[1]).write_bytes(b"something else")
    with pytest.raises(HarnessError, match=r"trl 1\.16\.0: .* is not what the lock names"):
        do_build(root, fake)
    assert not (root / "images/images.lock").exists()


class Server(http.server.ThreadingHTTPServer):
    """Answers with `content`, the first time cut off in the middle where `breaks`."""

    content = b"0123456789" * 1000
    breaks = True


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        cut = len(self.server.content) // 2 if self.server.breaks else None
        self.server.breaks = False
        self.wfile.write(self.server.content[:cut])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def file_of(server: Server, digest: str) -> wheelhouse.File:
    url = f"http://127.0.0.1:{server.server_port}/x/trl-1.0-py3-none-any.whl"
    return wheelhouse.File(name="trl", version="1.0", file_name="trl-1.0-py3-none-any.whl", sha256=digest, url=url)


def fetch(root: Path, file: wheelhouse.File) -> wheelhouse.Wheelhouse:
    house = wheelhouse.Wheelhouse(lock=IMAGE, files=(file,), folder=str(root / ".wheels"))
    wheelhouse._fetch_missing(house, quiet)
    return house


def test_a_download_that_breaks_is_tried_again(root: Path, index: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheelhouse.time, "sleep", lambda s: None)
    file = file_of(index, sha256(index.content))
    assert fetch(root, file).path(file).read_bytes() == index.content


def test_a_download_that_is_another_file_is_refused_and_not_kept(root: Path, index: Server) -> None:
    index.breaks = False
    with pytest.raises(HarnessError, match=r"trl 1\.0: .* has sha256 .*, the lock says 000"):
        fetch(root, file_of(index, "0" * 64))
    assert not [path for path in (root / ".wheels").rglob("*") if path.is_file()]


def test_an_index_that_does_not_answer_is_named(root: Path, index: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheelhouse.time, "sleep", lambda s: None)
    file = file_of(index, "0" * 64).model_copy(update={"url": "http://127.0.0.1:1/trl.whl"})
    with pytest.raises(HarnessError, match=r"trl 1\.0 could not be fetched: .*refused"):
        fetch(root, file)


# ---------------------------------------------------------------- building


def test_the_engine_is_handed_the_lock_its_wheels_and_what_was_asked(root: Path, fake: FakeEngine) -> None:
    built = do_build(root, fake)
    given = fake.builds[0]
    lock = requirements.digest(root / "images/train/cpu.txt")
    assert given["network_mode"] == "none"
    assert given["buildargs"] == {
        "BASE": BASE, "BUILD_BASE": BUILD_BASE, "BASE_DIGEST": BASE, "VARIANT": "cpu", "ARCH": "", "MAX_JOBS": "2",
        "LOCK_SHA256": lock.removeprefix("sha256:"), "REVISION": "unknown",
    }  # fmt: skip
    assert sorted(fake.context) == [
        "Containerfile", "build.txt", "build/install.sh", "requirements.txt", "tools.txt",
        "wheels/torch-2.13.0+cpu-py3-none-any.whl", "wheels/trl-1.16.0-py3-none-any.whl",
    ]  # fmt: skip
    assert fake.contents["requirements.txt"] == (root / "images/train/cpu.txt").read_bytes()
    assert {member.mtime for member in fake.context.values()} == {0}
    assert not built.unchanged
    noted = imagelock.read(root / "images/images.lock")
    assert noted.images == {"train-cpu": built.image}
    assert (built.image.image, built.image.lock, built.image.size_bytes) == (IMAGE, lock, 7)
    assert {name: built.image.versions[name] for name in WHEELS} == WHEELS
    assert built.image.versions["python"].startswith("3.11")
    assert noted.base is not None
    assert (noted.base.digest, noted.base.build_digest) == (BASE, BUILD_BASE)


def test_a_second_build_with_nothing_changed_asks_for_nothing(root: Path, fake: FakeEngine) -> None:
    first = do_build(root, fake)
    (root / "images/train/cpu.in").write_text("# a comment in what the lock is made from\n")
    shutil.rmtree(root / ".wheels")
    second = do_build(root, fake)
    assert second.unchanged
    assert (second.image, len(fake.builds)) == (first.image, 1)


def test_images_lock_names_the_base_of_now_where_it_changed_while_a_build_ran(root: Path, fake: FakeEngine) -> None:
    newer = f"base {IMAGE}\nbuild {BUILD_BASE}\n"

    def answer(argv: list[str]) -> tuple[int, str, str]:
        (root / "images/base/packages.lock").write_text(newer)
        return 0, installed(WHEELS), ""

    fake.answer = answer
    built = do_build(root, fake)
    noted = imagelock.read(root / "images/images.lock")
    assert noted.base is not None
    assert (noted.base.digest, built.image.base) == (IMAGE, BASE)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("images/train/Containerfile", "FROM ${BASE}\nUSER 1\n"),
        ("images/build/install.sh", "false\n"),
        ("images/build/tools.txt", "# another\n"),
        ("images/train/cpu.txt", ""),
        ("images/base/packages.lock", f"base {BUILD_BASE}\nbuild {BUILD_BASE}\n"),
    ],
)
def test_whatever_an_image_is_made_of_makes_it_anew(root: Path, fake: FakeEngine, name: str, text: str) -> None:
    do_build(root, fake)
    (root / name).write_text(text)
    assert not do_build(root, fake).unchanged


def test_an_image_that_the_engine_has_lost_is_built_again(root: Path, fake: FakeEngine) -> None:
    do_build(root, fake)
    del fake.known[IMAGE]
    assert not do_build(root, fake).unchanged


def test_other_architectures_are_another_cuda_image_and_the_same_cpu_image(root: Path, fake: FakeEngine) -> None:
    for variant, again in (("cpu", True), ("cuda", False)):
        request = Request(environment="train", variant=variant)
        do_build(root, fake, request)
        assert do_build(root, fake, request.model_copy(update={"architectures": ("9.0",)})).unchanged is again
    assert fake.builds[-1]["buildargs"]["ARCH"] == "9.0"


@pytest.mark.parametrize("base", ["debian:12", "debian", f"debian:12@sha256:{'a' * 63}", BASE])
def test_a_base_that_is_not_named_by_digest_is_refused(root: Path, fake: FakeEngine, base: str) -> None:
    with pytest.raises(HarnessError, match="is not pinned") as refused:
        do_build(root, fake, REQUEST.model_copy(update={"base": base}))
    assert "NAME@sha256:" in refused.value.hint


def test_a_base_of_ones_own_is_pulled_by_digest(root: Path, fake: FakeEngine) -> None:
    own = f"registry.example/debian@{IMAGE}"
    built = do_build(root, fake, REQUEST.model_copy(update={"base": own}))
    assert fake.pulled == [own]
    assert fake.builds[0]["buildargs"]["BASE"] == own
    assert (built.image.base, imagelock.read(root / "images/images.lock").base.digest) == (IMAGE, BASE)  # type: ignore[union-attr]


def test_a_build_that_fails_shows_its_last_lines_and_changes_no_lock(root: Path, fake: FakeEngine) -> None:
    fake.says = [{"stream": "compiling\n"}, {"stream": "out of memory\n"}, {"error": "returned a non-zero code: 1"}]
    with pytest.raises(HarnessError, match="non-zero code: 1") as failed:
        do_build(root, fake)
    assert "out of memory" in failed.value.hint
    assert not (root / "images/images.lock").exists()


def test_a_base_that_tools_base_does_not_make_is_an_error(root: Path, fake: FakeEngine) -> None:
    del fake.known[BASE]
    script = root / "tools/base"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho no mmdebstrap here >&2; exit 2\n")
    script.chmod(0o755)
    with pytest.raises(HarnessError, match="did not make the base images") as failed:
        do_build(root, fake)
    assert failed.value.hint == "no mmdebstrap here"


def test_every_file_of_the_images_folder_that_belongs_there_is_in_the_context(root: Path) -> None:
    (root / "images/train/parsers").mkdir()
    (root / "images/train/parsers/plugin.py").write_text("x = 1\n")
    (root / "images/build/install.sh").chmod(0o755)
    found = context.sources(root / "images", "train", "cpu")
    assert "parsers/plugin.py" in found.files
    assert found.executable == {"build/install.sh"}


def test_words_that_ask_for_nothing_known() -> None:
    with pytest.raises(HarnessError, match=r"'trian' .*did you mean train"):
        build.requests("trian", "cpu", None, None, 2)
    with pytest.raises(HarnessError, match="'rocm' is none of cpu, cuda"):
        build.requests("train", "rocm", None, None, 2)
    assert [one.environment for one in build.requests(None, "cpu", None, None, 2)] == ["train", "serve"]


def test_without_an_engine_there_is_one_plain_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(HarnessError, match=r"no Docker Engine answers at unix://.*none\.sock \(No such file"):
        engine.connect()


# ---------------------------------------------------------------- verifying


def verified(root: Path, fake: FakeEngine, answers: dict[str, str], name: str = "train-cpu") -> verify.Verdict:
    """The verdict on an image that answers so to `installed`, `imports` and `native`."""
    do_build(root, fake)
    lock = requirements.digest(root / "images/train/cpu.txt")
    environment, variant = name.split("-")
    labels = {"harness.environment": environment, "harness.variant": variant, "harness.lock": lock}
    fake.known[IMAGE] |= {"Config": {"Labels": labels}}
    (root / "images/train/cuda.txt").write_text((root / "images/train/cpu.txt").read_text())

    def answer(argv: list[str]) -> tuple[int, str, str]:
        kind = argv[4]
        if kind in answers:
            return 0, answers[kind], ""
        return 0, "".join(f'{{"try": "{n}"}}\n{{"name": "{n}", "ok": true}}\n' for n in argv[5:]), ""

    fake.answer = answer
    return verify.verify(IMAGE, root, fake)  # type: ignore[arg-type]


def wrong(verdict: verify.Verdict) -> list[str]:
    return [f"{check.what}: {check.detail}" for check in verdict.checks if check.state == "wrong"]


def test_an_image_that_is_as_locked(root: Path, fake: FakeEngine) -> None:
    verdict = verified(root, fake, {"installed": installed(WHEELS)})
    assert (verdict.ok, wrong(verdict), verdict.packages, verdict.imported) == (True, [], 2, 2)
    assert "bitsandbytes' CPU library" in {check.what for check in verdict.checks}


@pytest.mark.parametrize(
    ("says", "finding"),
    [
        (installed({**WHEELS, "trl": "1.15.0"}), "versions: trl 1.15.0 is installed, and the lock says 1.16.0"),
        (installed({**WHEELS, "extra": "1"}), "versions: extra 1 is installed, and the lock does not have it"),
        (installed({"trl": "1.16.0"}), "versions: torch is in the lock, and not installed"),
        (installed(WHEELS, uid=0), "user: it runs as root"),
        (installed(WHEELS, compilers=["gcc"]), "compilers: gcc"),
        (installed(WHEELS, packages=False), "package list: /opt/harness/packages.cdx.json is missing"),
    ],
)
def test_what_differs_is_said(root: Path, fake: FakeEngine, says: str, finding: str) -> None:
    verdict = verified(root, fake, {"installed": says})
    assert not verdict.ok
    assert wrong(verdict) == [finding]


def test_a_missing_kernel_and_a_broken_import_are_wrong(root: Path, fake: FakeEngine) -> None:
    native = '{"try": "b"}\n{"name": "bitsandbytes:libbitsandbytes_cpu.so", "ok": false, "error": "LookupError: no"}\n'
    imports = (
        '{"try": "torch"}\n{"name": "torch", "ok": true}\n{"try": "trl"}\n{"name": "trl", "ok": false, "error": "E"}\n'
    )
    verdict = verified(root, fake, {"installed": installed(WHEELS), "native": native, "imports": imports})
    assert wrong(verdict) == ["import trl: E", "bitsandbytes' CPU library: LookupError: no"]


@pytest.mark.parametrize("library", ["libcuda.so.1", "libnvidia-encode.so.1"])
def test_what_only_a_gpu_can_show_is_said_and_not_wrong(root: Path, fake: FakeEngine, library: str) -> None:
    for_want = f"ImportError: {library}: cannot open shared object file"
    imports = (
        f'{{"try": "selective_scan_cuda"}}\n{{"name": "selective_scan_cuda", "ok": false, "error": "{for_want}"}}\n'
    )
    verdict = verified(root, fake, {"installed": installed(WHEELS, cuda="13.0"), "imports": imports}, "train-cuda")
    assert "mamba-ssm's CUDA extension" in {check.what for check in verdict.checks if check.state == "unchecked"}
    assert any("that a kernel runs on a GPU" in line for line in verdict.without_gpu)
    assert any(for_want in line for line in verdict.without_gpu)


def test_advice_behind_an_error_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "advising.py").write_text("raise RuntimeError('no library\\n\\n=== TROUBLESHOOTING ===\\n1. Try')")
    argv = [sys.executable, *probe.argv("imports", "advising")[1:]]
    ended = subprocess.run(argv, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout.splitlines()[1])["error"] == "RuntimeError: no library"


@pytest.mark.parametrize(
    ("error", "state"),
    [
        ("OSError: libcuda.so.1: cannot open shared object file", "unchecked"),
        ("OSError: cuda_utils.so: undefined symbol: cuModuleLoadData", "wrong"),
    ],
)
def test_a_triton_that_names_no_driver_is_wrong_without_a_gpu_too(
    root: Path, fake: FakeEngine, error: str, state: str
) -> None:
    """Linked with libcuda.so.1 it lacks that library here; linked with none it would lack its symbols on any host."""
    answers: dict[str, dict[str, object]] = {
        "bitsandbytes:libbitsandbytes_cuda130.so": {"ok": True},
        "triton:/opt/harness/triton/cuda_utils.so": {"ok": False, "error": error},
    }
    native = "".join(f"{json.dumps({'try': n})}\n{json.dumps({'name': n} | said)}\n" for n, said in answers.items())
    verdict = verified(root, fake, {"installed": installed(WHEELS, cuda="13.0"), "native": native}, "train-cuda")
    assert [check.state for check in verdict.checks if check.what == "Triton's module for the driver"] == [state]


def test_an_import_that_crashes_is_named_and_the_rest_still_tried(fake: FakeEngine) -> None:
    def answer(argv: list[str]) -> tuple[int, str, str]:
        names, out = argv[5:], ""
        for name in names:
            out += json.dumps({"try": name}) + "\n"
            if name == "bad":
                return 139, out, ""
            out += json.dumps({"name": name, "ok": True}) + "\n"
        return 0, out, ""

    fake.answer = answer
    tried = probe.attempts(fake, IMAGE, "imports", ["a", "bad", "c"])  # type: ignore[arg-type]
    assert [(one.name, one.ok) for one in tried] == [("a", True), ("bad", False), ("c", True)]
    assert tried[1].error == "crashed: exit code 139"


def test_an_image_that_is_not_the_one_in_images_lock(root: Path, fake: FakeEngine) -> None:
    verdict = verified(root, fake, {"installed": installed(WHEELS)})
    other = f"sha256:{'d' * 64}"
    fake.known[other] = {**fake.known[IMAGE], "Id": other}
    assert wrong(verify.verify(other, root, fake)) == [  # type: ignore[arg-type]
        f"images.lock: it names {verdict.image} as train-cpu, not this one"
    ]


def test_an_image_that_is_not_there_names_those_that_are(root: Path, fake: FakeEngine) -> None:
    with pytest.raises(HarnessError, match="the Engine has no image train-gpu") as refused:
        verify.verify("train-gpu", root, fake)  # type: ignore[arg-type]
    assert "harness build" in refused.value.hint


# ---------------------------------------------------------------- bundles


@pytest.fixture
def whole(root: Path, tmp_path: Path) -> Path:
    """The checkout with the program and the locks of the control plane and of uv."""
    (tmp_path / "index/uv-0.13.9-py3-none-any.whl").write_bytes(b"uv")
    (root / "tools/requirements").mkdir(parents=True)
    (root / "tools/requirements/harness.txt").write_text((root / "images/train/cpu.txt").read_text())
    (root / "tools/requirements/uv.txt").write_text(f"uv==0.13.9 --hash=sha256:{sha256(b'uv')}\n")
    (root / "harness/__pycache__").mkdir(parents=True)
    (root / "harness/__pycache__/x.pyc").write_text("")
    (root / "harness/__init__.py").write_text("")
    return root


def test_a_bundle_holds_wheels_locks_program_and_installer(whole: Path, tmp_path: Path) -> None:
    to = tmp_path / "bundle"
    made = bundle.bundle([REQUEST], whole, to, quiet)
    assert (made.environments, made.images, made.files) == (("train-cpu",), (), 3)
    found = json.loads((to / "bundle.json").read_text())
    assert found["files"] == {path.name: sha256(path.read_bytes()) for path in (to / "wheels").iterdir()}
    assert [place["folder"] for place in found["places"]] == [".venv", ".envs/train"]
    assert all((to / place["lock"]).is_file() for place in found["places"])
    assert (to / "images/train/cpu.txt").is_file()
    assert (to / "harness/__init__.py").is_file()
    assert not (to / "harness/__pycache__").exists()
    assert (to / "install.py").read_text() == bundle.INSTALLER.read_text()
    bundle.bundle([REQUEST], whole, to, quiet)  # a second call brings it up to date


def test_sources_come_as_the_built_image_and_not_at_all_without_it(
    whole: Path, tmp_path: Path, fake: FakeEngine
) -> None:
    found = wheelhouse.gather(whole / "images/train/cpu.txt", whole / ".wheels", quiet)
    torch, trl = found.files
    source = trl.model_copy(update={"file_name": "trl-1.16.0.tar.gz"})
    house = found.model_copy(update={"files": (torch, source)})
    shutil.copyfile(found.path(trl), house.path(source))
    wheelhouse._remember(whole / ".wheels", house)
    (whole / "tools/requirements/harness.txt").write_text("")
    with pytest.raises(HarnessError, match="its image is not built") as refused:
        bundle.bundle([REQUEST], whole, tmp_path / "none", quiet, fake)  # type: ignore[arg-type]
    assert "harness build train --variant cpu" in refused.value.hint
    do_build(whole, fake)
    made = bundle.bundle([REQUEST], whole, tmp_path / "bundle", quiet, fake)  # type: ignore[arg-type]
    assert (made.environments, made.images) == ((), ("train-cpu",))
    assert (tmp_path / "bundle/images/train-cpu.tar").read_bytes() == b"layers"
    assert not list((tmp_path / "bundle/wheels").glob("trl*"))


def test_an_engine_that_packs_an_image_for_minutes_is_waited_for_and_a_broken_export_leaves_no_file(
    whole: Path, tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []

    def connect(timeout_s: int = engine.ANSWER_S) -> FakeEngine:
        waited.append(timeout_s)
        return fake

    def save() -> Iterator[bytes]:
        yield b"lay"
        raise requests.exceptions.ReadTimeout("Read timed out.")

    monkeypatch.setattr(engine, "connect", connect)
    fake.images.get = lambda image: SimpleNamespace(save=save)
    do_build(whole, fake)
    with pytest.raises(
        HarnessError, match=r"train-cpu cannot be exported: the Engine at .* did not answer \(ReadTimeout"
    ):
        bundle._export("train-cpu", whole, tmp_path / "images/train-cpu.tar", quiet, None)
    assert waited == [bundle.EXPORT_TIMEOUT_S]
    assert waited[0] >= 600
    assert list((tmp_path / "images").iterdir()) == []


def test_a_bundle_overwrites_nobodys_folder(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    with pytest.raises(HarnessError, match="is no empty folder"):
        bundle.bundle([REQUEST], whole, tmp_path / "mine", quiet)


def test_a_damaged_bundle_or_another_python_is_refused_before_anything_is_installed(
    whole: Path, tmp_path: Path
) -> None:
    to = tmp_path / "bundle"
    bundle.bundle([REQUEST], whole, to, quiet)

    def install() -> tuple[int, str]:
        ended = subprocess.run([sys.executable, "-IS", to / "install.py"], capture_output=True, text=True, check=False)
        return ended.returncode, ended.stderr

    (to / "wheels/uv-0.13.9-py3-none-any.whl").unlink()
    (to / "wheels/uv-0.13.9-py3-none-any.whl").write_bytes(b"something else")
    code, said = install()
    assert (code, "installer in this bundle is damaged" in said) == (2, True)
    text = (to / "bundle.json").read_text()
    (to / "bundle.json").write_text(text.replace('"python": "3.11"', '"python": "2.7"'))
    code, said = install()
    assert (code, "this bundle is for Python 2.7" in said) == (2, True)
    assert not (to / ".venv").exists()
