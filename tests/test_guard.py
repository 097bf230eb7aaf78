"""The guard around unmarked tests, the skips of marked ones and their order: pytest itself runs them here."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.fixture
def inner(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder with this suite's conftest, to run tests in that are meant to fail."""
    (pytester.path / "tests").mkdir()
    (pytester.path / "tests/conftest.py").write_text(CONFTEST.read_text())
    marks = "\n".join(f"    {name}: x" for name in ("payload", "server", "docker", "slurm", "gpu", "browser", "long"))
    pytester.makeini(f"[pytest]\ntestpaths = tests\nmarkers =\n{marks}\n")
    return pytester


def run(inner: pytest.Pytester, code: str, *options: str) -> pytest.RunResult:
    (inner.path / "tests/test_inner.py").write_text(code)
    return inner.runpytest_inprocess("-p", "no:cacheprovider", "-rs", "-v", *options)


@pytest.mark.parametrize(
    "reach",
    [
        "socket.create_connection(('192.0.2.1', 80), timeout=0.01)",
        "socket.getaddrinfo('example.org', 80)",
        "with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s: s.sendto(b'x', ('192.0.2.1', 9))",
        "with socket.socket(socket.AF_UNIX) as s: s.connect('/var/run/docker.sock')",
        "subprocess.run([REAL / 'sbatch'])",
    ],
)
def test_an_unmarked_test_is_refused_the_world_even_where_it_swallows_the_refusal(
    inner: pytest.Pytester, reach: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = Path("/usr/bin")  # not a temporary folder, not below tests/
    monkeypatch.setattr("shutil.which", lambda name, **_: str(programs / name))
    code = f"""
import pathlib, socket, subprocess
REAL = pathlib.Path({str(programs)!r})
def test_reaches():
    try:
        {reach}
    except BaseException:
        pass
"""
    result = run(inner, code)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*an unmarked test reached for*"])


def test_loopback_and_own_socket_files_are_allowed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "s"))
        server.listen()
        client.connect(str(tmp_path / "s"))


def test_a_fake_program_in_a_temporary_folder_is_allowed(tmp_path: Path) -> None:
    fake = tmp_path / "sbatch"
    fake.write_text("#!/bin/sh\necho 7\n")
    fake.chmod(0o755)
    assert subprocess.run([fake], capture_output=True, text=True, check=True).stdout == "7\n"


def test_a_missing_service_is_a_skip_with_its_reason(inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_ENVS", str(inner.path / "nowhere"))
    monkeypatch.delenv("HARNESS_REQUIRE_SERVICES", raising=False)
    result = run(inner, "import pytest\n@pytest.mark.payload\ndef test_trains(): pass\n")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*no train environment at *nowhere: tools/setup train*"])


def test_a_missing_service_is_a_failure_where_services_are_required(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_ENVS", str(inner.path / "nowhere"))
    monkeypatch.setenv("HARNESS_REQUIRE_SERVICES", "1")
    result = run(inner, "import pytest\n@pytest.mark.server\ndef test_serves(): pass\n")
    result.assert_outcomes(errors=1)


STAGES = """
import pytest
@pytest.mark.long
def test_long(): pass
@pytest.mark.slurm
def test_slurm(): pass
@pytest.mark.payload
def test_payload(): pass
def test_unmarked(): assert {passes}
"""


def test_quick_tests_come_first_and_long_ones_only_when_asked(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_ENVS", str(inner.path / "nowhere"))
    monkeypatch.delenv("HARNESS_REQUIRE_SERVICES", raising=False)
    code = STAGES.format(passes=True).replace("@pytest.mark.slurm", "@pytest.mark.server")
    order = ["*test_unmarked*", "*test_payload*", "*test_slurm*"]
    plain = run(inner, code)
    plain.stdout.fnmatch_lines(order)
    plain.assert_outcomes(passed=1, skipped=2, deselected=1)
    run(inner, code, "--long").assert_outcomes(passed=2, skipped=2)
    run(inner, code, "--fast").assert_outcomes(passed=1, deselected=3)


def test_a_slower_stage_does_not_begin_after_a_failure(inner: pytest.Pytester) -> None:
    result = run(inner, STAGES.format(passes=False))
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines(["*left out*"])
