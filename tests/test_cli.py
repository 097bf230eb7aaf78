"""The command line: verbs, exit codes, and one clear message for a mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness import cli

ROOT = Path(__file__).parent.parent
VERBS = {"plan", "run", "report", "show", "doctor", "cancel", "triage", "drill", "build", "verify", "fetch"}

MATRIX = """\
version: 1
name: small
defaults: {device: cpu, variant: tiny-hybrid, steps: 4, warmup_steps: 1}
train:
  - method: [lora, full]
    seq_len: [64, 128]
"""


def harness(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["harness", *argv])
    code = cli.main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(MATRIX)
    return path


def test_the_verbs_are_these(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = harness(capsys, monkeypatch, "--help")
    assert code == 0
    assert set(re.findall(r"^[│ ]+([a-z]+)  +[A-Z]", out, re.MULTILINE)) == VERBS


@pytest.mark.parametrize(
    ("line", "wrong", "nearest"),
    [("defaults: {varient: tiny-hybrid}", "varient", "variant"), ("trian: {}", "trian", "train")],
)
def test_a_misspelt_key_exits_2_with_file_line_and_nearest_key(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    line: str,
    wrong: str,
    nearest: str,
) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text(f"version: 1\nname: typo\n{line}\n")
    code, out, err = harness(capsys, monkeypatch, "run", str(path), "--runs", str(tmp_path / "runs"))
    assert (code, out) == (2, "")
    assert f"{path}:3" in err
    assert wrong in err
    assert nearest in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("argv", [["run"], ["rum", "x.yaml"], ["run", "x.yaml", "--no-such-option"]])
def test_a_wrong_call_exits_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    code, _, err = harness(capsys, monkeypatch, *argv)
    assert code == 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "argv", [["plan", "absent.yaml"], ["show", "nothing-of-that-name"], ["report", "absent"], ["cancel", "absent"]]
)
def test_what_is_not_there_exits_2_and_names_a_next_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argv: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = harness(capsys, monkeypatch, *argv)
    assert code == 2
    message, hint = err.strip().split("\n", 1)
    assert message.startswith("harness: ")
    assert hint.strip()


def test_a_dry_run_names_the_cases_and_makes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, matrix: Path, tmp_path: Path
) -> None:
    code, out, _ = harness(
        capsys, monkeypatch, "run", str(matrix), "--dry-run", "--json", "--runs", str(tmp_path / "runs")
    )
    assert code == 0
    assert len(json.loads(out)["would_measure"]) == 4
    assert not (tmp_path / "runs").exists()


def test_plan_as_json_holds_every_case_resolved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, matrix: Path
) -> None:
    code, out, _ = harness(capsys, monkeypatch, "plan", str(matrix), "--json")
    assert code == 0
    cases = json.loads(out)["cases"]
    assert sorted((case["method"], case["seq_len"]) for case in cases) == [
        ("full", 64), ("full", 128), ("lora", 64), ("lora", 128)
    ]  # fmt: skip
    assert all(case["lora_targets"] for case in cases if case["method"] == "lora")


def test_the_control_plane_never_imports_what_a_payload_needs() -> None:
    code = (
        "import sys; from harness import cli, pipeline, doctor, results; from harness.report import terminal;"
        "bad = {'torch', 'transformers', 'vllm', 'peft', 'trl'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
