"""Logs of any origin: the class of what began it, who, evidence that stands in the log, and a next step.

The log lines here are of our own wording around what a library prints.
"""

from __future__ import annotations

import bz2
import gzip
import html
import io
import lzma
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from ruamel.yaml import YAML

from harness.errors import HarnessError
from harness.report import triage as views
from harness.schema import LogVerdict
from harness.scrub import plain
from harness.triage import as_json, triage
from harness.triage.signature import kinds, signatures

Cases = dict[str, list[dict[str, Any]]]
ANY: Cases = YAML(typ="safe").load(Path(__file__).parent / "signatures" / "any.yaml")
FURTHER: list[Cases] = [
    YAML(typ="safe").load(Path(__file__).parent / "signatures" / f"{name}.yaml")
    for name in ("hosts", "devices", "setup")
]
CASES = [
    (name, index, case)
    for name in ANY
    for index, case in enumerate([*ANY[name], *(case for cases in FURTHER for case in cases.get(name, []))])
]


def of(tmp_path: Path, **files: str) -> LogVerdict:
    """The verdict over files of this text, by name."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return triage([tmp_path])


@pytest.mark.parametrize(("name", "index", "case"), CASES, ids=[f"{name}-{index}" for name, index, _ in CASES])
def test_a_log_of_each_class(tmp_path: Path, name: str, index: int, case: dict[str, Any]) -> None:
    found = of(tmp_path, log=case["log"])
    assert found.failure_class == name, found.evidence
    assert found.next.step
    assert as_json(found)["class"] == name
    for line in found.evidence:
        assert line.text in case["log"].split("\n")[line.line - 1]
    if name not in ("unknown", "coll_timeout"):
        assert found.evidence
    if "rank" in case:
        assert found.culprit
        assert found.culprit.rank == case["rank"]
    if "host" in case:
        assert found.culprit
        assert found.culprit.host == case["host"]
    if name in ("no_failure", "unknown"):
        assert found.culprit is None


def test_every_class_of_the_taxonomy_has_a_log() -> None:
    assert set(ANY) == set(kinds())
    assert all(set(cases) <= set(ANY) for cases in FURTHER)
    assert {signature.failure_class for signature in signatures()} - set(kinds()) <= {"not_as_requested"}


# ---------------------------------------------------------------- places: errors that no text names


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("vllm/model_executor/layers/quantization/awq.py", "quant_setup"),
        ("peft/mapping.py", "peft_config"),
        ("vllm/lora/worker_manager.py", "peft_config"),
        ("vllm/config/parallel.py", "parallel_config"),
        ("vllm/model_executor/model_loader/weight_utils.py", "ckpt_load_mismatch"),
        ("vllm/config/model.py", "model_unsupported"),
        ("torch/distributed/fsdp/_runtime_utils.py", "shard_dtype"),
        ("datasets/arrow_dataset.py", "data_format"),
        ("huggingface_hub/file_download.py", "hub_access"),
        ("transformers/utils/import_utils.py", "dep_missing_abi"),
        ("torch/cuda/__init__.py", "driver_runtime"),
        ("torch/distributed/elastic/rendezvous/dynamic_rendezvous.py", "rdzv_timeout"),
        ("transformers/utils/quantization_config.py", "quant_setup"),
        ("transformers/utils/loading_report.py", "ckpt_load_mismatch"),
        ("transformers/tokenization_utils_base.py", "data_format"),
        ("megatron/core/dist_checkpointing/mapping.py", "ckpt_load_mismatch"),
        ("megatron/training/arguments.py", "parallel_config"),
        ("llamafactory/data/aligner.py", "data_format"),
        ("botocore/auth.py", "hub_access"),
        ("my/own/train.py", "app_exception"),
        ("my/own/data/train.py", "app_exception"),
    ],
)
def test_an_unknown_error_is_of_the_library_that_raised_it(tmp_path: Path, place: str, name: str) -> None:
    frames = "".join(f'  File "{file}", line 7, in do\n    do()\n' for file in ("/a/train.py", f"/x/{place}"))
    assert of(tmp_path, log=f"Traceback (most recent call last):\n{frames}ValueError: odd").failure_class == name


# ---------------------------------------------------------------- what is told apart

OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. "
    "GPU {gpu} has a total capacity of 9.00 GiB of which 1.00 GiB is free."
)
WAITED = (
    "[rank{rank}]:[E301 10:30:0{rank}.0 x.cpp:1] [Rank {rank}] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=4, NumelOut=4, Timeout(ms)=600000) "
    "ran for 600010 milliseconds before timing out."
)


def test_one_ranks_memory_and_the_others_timeout(tmp_path: Path) -> None:
    found = of(tmp_path, **{"rank_0.log": WAITED.format(rank=0), "rank_1.log": f"[rank1]: {OOM.format(gpu=1)}"})
    assert found.failure_class == "oom_gpu_forward"
    assert found.culprit
    assert (found.culprit.rank, found.culprit.gpu) == (1, "1")
    assert {event.role for event in found.timeline} == {"initiating", "cascade"}


def test_what_all_ranks_say_has_no_culprit(tmp_path: Path) -> None:
    log = "\n".join(f"[rank{rank}]: KeyError: 'odd'" for rank in range(4))
    found = of(tmp_path, log=log)
    assert (found.failure_class, found.culprit, found.culprit_status) == ("app_exception", None, "unknown")


def test_the_last_attempt_is_judged_and_the_earlier_is_listed(tmp_path: Path) -> None:
    again = "[default] Worker group FAILED. 2/3 attempts left; will restart worker group"
    log = f"{OOM.format(gpu=0)}\n{again}\nOSError: [Errno 28] No space left on device"
    found = of(tmp_path, log=log)
    assert (found.failure_class, found.attempts, found.earlier) == ("storage_full", 2, ("oom_gpu_forward",))
    fine = of(tmp_path, log=f"{log}\nwill restart worker group\n{{'train_runtime': 3.0}}")
    assert (fine.failure_class, fine.attempts) == ("no_failure", 3)


def test_silence_is_evidence(tmp_path: Path) -> None:
    steps = [
        f"{rank}: RANK {rank}: step {step}/10" for step in (1, 2, 3) for rank in range(6) if (rank, step) != (4, 3)
    ]
    found = of(
        tmp_path,
        log="\n".join(
            [
                *steps,
                "2: slurmstepd: error: *** STEP 7.1 ON n1 CANCELLED AT 2026-03-01T10:00:00 ***",
                "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-03-01T10:00:00 DUE TO TIME LIMIT ***",
            ]
        ),
    )
    assert found.failure_class == "coll_timeout"
    assert found.class_status == "hypothesis"
    assert found.culprit
    assert found.culprit.rank == 4


def test_numbers_of_the_log_stand_in_the_next_step(tmp_path: Path) -> None:
    log = (
        "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 GiB KV cache is "
        "needed, which is larger than the available KV cache memory (9.3 GiB). Based on the available memory, the "
        "estimated maximum model length is 76256."
    )
    assert "131072 -> 76256" in of(tmp_path, log=log).next.step
    log = 'python train.py --max_seq_length 8192\n[rank0]:   File "/x/m.py", line 1, in forward\n' + OOM.format(gpu=0)
    assert "8192 -> 4096" in of(tmp_path, log=log).next.step
    log = f"{OOM.format(gpu=0)} Process 4711 has 6.50 GiB memory in use. this process has 1.00 GiB memory in use"
    assert "process 4711 holds 6.5 GiB" in of(tmp_path, log=log).next.step


# ---------------------------------------------------------------- whatever is given


def test_compressed_logs_and_archives(tmp_path: Path) -> None:
    text = f"[rank1]: {OOM.format(gpu=1)}\n".encode()
    for name, packed in (
        ("a.log.gz", gzip.compress(text)),
        ("b.xz", lzma.compress(text)),
        ("c.bz2", bz2.compress(text)),
    ):
        (tmp_path / name).write_bytes(packed)
        found = triage([tmp_path / name])
        assert (found.failure_class, found.evidence[0].file) == ("oom_gpu_forward", name)
    (tmp_path / "torn.gz").write_bytes(gzip.compress(text * 9)[:-4])
    assert triage([tmp_path / "torn.gz"]).failure_class == "oom_gpu_forward"
    archive = tmp_path / "logs.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("attempt_0/1/stderr.log")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
    found = triage([archive])
    assert found.evidence[0].file == "logs.tar.gz/attempt_0/1/stderr.log"
    assert found.culprit
    assert found.culprit.rank == 1


def dump(*sizes: int, name: str = "nccl:all_reduce") -> bytes:
    """A Flight Recorder dump of one group."""
    entries = [{"process_group": ("0", "default_pg"), "collective_seq_id": number, "profiling_name": name,
                "input_sizes": [[size]], "state": "scheduled"} for number, size in enumerate(sizes, 1)]  # fmt: skip
    return pickle.dumps({"version": "2.5", "entries": entries})


def test_flight_recorder_dumps_name_who_did_not_join_or_asked_for_something_else(tmp_path: Path) -> None:
    for rank in range(4):
        (tmp_path / f"trace_rank_{rank}").write_bytes(dump(*(8,) * (3 if rank == 2 else 5)))
    missing = triage([tmp_path])
    assert (missing.failure_class, missing.culprit and missing.culprit.rank) == ("coll_timeout", 2)
    (tmp_path / "trace_rank_2").write_bytes(dump(8, 8, 9, 8, 8))
    differs = triage([tmp_path])
    assert (differs.failure_class, differs.culprit and differs.culprit.rank) == ("coll_mismatch", 2)


class Evil:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch ran",))


def test_a_hostile_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace_rank_0").write_bytes(pickle.dumps({"entries": [Evil()]}))
    with pytest.raises(HarnessError):
        triage([tmp_path / "trace_rank_0"])
    assert not (tmp_path / "ran").exists()


def test_unusable_input_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 100)
    for path in (tmp_path / "none", tmp_path / "binary"):
        with pytest.raises(HarnessError) as error:
            triage([path])
        assert error.value.hint


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.binary(max_size=80), st.sampled_from([case["log"].encode() for _, _, case in CASES])), max_size=4
    )
)
def test_whatever_is_read_there_is_an_answer_whose_quotes_stand_in_it(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("any") / "log"
    path.write_bytes(b"x\n" + b"\n".join(parts))
    try:
        found = triage([path])
    except HarnessError:
        return
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    for quote in found.evidence:
        assert quote.text in plain(lines[quote.line - 1]) or quote.text in lines[quote.line - 1]
    assert (found.culprit is None) == (found.culprit_status == "unknown")


def test_an_endless_line_and_many_errors_are_read_in_time(tmp_path: Path) -> None:
    found = of(
        tmp_path,
        log="KeyError loss error x" * 200_000 + "\n" + OOM.format(gpu=0) + "\n" + "RuntimeError: odd\n" * 20_000,
    )
    assert found.failure_class == "oom_gpu_forward"


def test_a_number_decides_after_many_lines_that_differ_in_it_alone(tmp_path: Path) -> None:
    calm = "\n".join(f"[ {index}.0] NVRM: Xid (PCI:0000:3b:00): 13, pid=7" for index in range(300))
    assert of(tmp_path, log=f"{calm}\n[ 999.0] NVRM: Xid (PCI:0000:3b:00): 79, pid=7").failure_class == "hw_gpu_fault"
    tried = "\n".join(f"try {index}: os error 4, again" for index in range(300))
    assert of(tmp_path, log=f"{tried}\ntry 300: os error 28, giving up").failure_class == "storage_full"


# ---------------------------------------------------------------- what a person sees


def test_the_terminal_and_the_page_show_the_verdict_and_escape_the_log(tmp_path: Path) -> None:
    said = "[rank1]: ValueError: <script>alert(1)</script> [bold]x[/bold] \x1b[31mred"
    found = of(tmp_path, log=f"[rank0]: fine\n{said}\n{WAITED.format(rank=0)}")
    console = Console(width=80, file=io.StringIO(), highlight=False)
    for part in views.terminal(found):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    for word in ("app_exception", "rank 1", "log:2", "[bold]x[/bold]", "Timeline", "Next"):
        assert word in text
    assert "\x1b" not in text
    page = views.page(found)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in html.unescape(page)
    assert "http" not in page.replace("http-equiv", "")


# ---------------------------------------------------------------- who began it, and who only stood beside it

TABLE = "\n".join(
    [
        "W0301 10:00:07.0 70 torch/distributed/elastic/api.py:1] Sending process {other} closing signal SIGTERM",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:",
        "Failures:",
        "[1]:",
        "  rank      : 1 (local_rank: 1)",
        "  exitcode  : -15 (pid: {listed})  (SIGTERM)",
        "Root Cause (first observed failure):",
        "[0]:",
        "  rank      : 0 (local_rank: 0)",
        "  exitcode  : 1 (pid: 71)",
    ]
)
GLOO = "[rank0]: RuntimeError: [/x/gloo/transport/tcp/{text}"


def test_of_two_ranks_the_one_that_did_not_wait_is_behind(tmp_path: Path) -> None:
    waited = GLOO.format(text="unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete")
    found = of(tmp_path, log=f"{waited}\n{TABLE.format(other=72, listed=72)}")
    assert found.failure_class == "coll_timeout"
    assert found.culprit
    assert found.culprit.rank == 1
    (tmp_path / "log").write_text(f"{waited}\n{TABLE.format(other=72, listed=73)}")  # a third process was ended too
    assert triage([tmp_path]).culprit is None


def test_two_ranks_that_gave_up_in_different_collectives_disagree(tmp_path: Path) -> None:
    def gave_up(rank: int, name: str) -> str:
        frame = f'[rank{rank}]:   File "/x/torch/distributed/distributed_c10d.py", line 7, in {name}'
        text = "unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete"
        return (
            f"[rank{rank}]: Traceback (most recent call last):\n{frame}\n[rank{rank}]:     work.wait()\n"
            + GLOO.format(text=text).replace("rank0", f"rank{rank}")
        )

    other = "\n".join([gave_up(0, "all_reduce"), gave_up(1, "broadcast")])
    assert of(tmp_path, log=other).failure_class == "coll_mismatch"
    same = "\n".join([gave_up(0, "all_reduce"), gave_up(1, "all_reduce")])
    assert of(tmp_path, log=same).failure_class == "coll_timeout"


def test_what_every_rank_says_is_nobodys_even_where_the_launcher_saw_one_first(tmp_path: Path) -> None:
    said = "\n".join(f"[rank{rank}]: AttributeError: 'Tensor' object has no attribute 'odd'" for rank in (0, 1))
    found = of(tmp_path, log=f"{said}\n{TABLE.format(other=72, listed=72)}")
    assert (found.failure_class, found.culprit) == ("app_exception", None)
    both = "\n".join(f"[default{rank}]:Fatal Python error: Segmentation fault" for rank in (1, 0))
    (tmp_path / "log").write_text(both)
    assert triage([tmp_path]).culprit is None


def test_a_loss_that_is_nan_on_one_rank_first(tmp_path: Path) -> None:
    losses = (("0", 3, "0.9"), ("1", 3, "nan"), ("0", 4, "nan"), ("1", 4, "nan"))
    lines = [f"[rank{rank}] step {step}/8 loss {loss}" for rank, step, loss in losses]
    found = of(tmp_path, log="\n".join(lines))
    assert found.failure_class == "nan_loss"
    assert found.culprit
    assert found.culprit.rank == 1
    (tmp_path / "log").write_text("[rank0] step 3/8 loss nan\n[rank1] step 3/8 loss nan")
    assert triage([tmp_path]).culprit is None


def test_frames_of_pytorchs_own_stack_are_no_errors(tmp_path: Path) -> None:
    frames = "frame #1: c10::DistError::DistError(c10::SourceLocation, std::string) + 0x72 (0x7f in /x/libc10.so)"
    error = "torch.distributed.DistNetworkError: The client socket has timed out after 3000ms while trying to connect"
    found = of(tmp_path, log=f"{frames}\n{error} to (10.0.0.1, 29500).")
    assert (found.failure_class, found.evidence[0].line) == ("rdzv_timeout", 2)


def test_numbers_of_a_lines_head_are_no_sizes(tmp_path: Path) -> None:
    lines = [
        f"[rank{rank}]:[I0301 10:00:0{rank}.3516232{rank} reducer.cpp:2054] {rank} buckets rebuilt, size limits: 64"
        for rank in (0, 1)
    ]
    crash = "[default1]:Fatal Python error: Segmentation fault"
    found = of(tmp_path, log="\n".join([*lines, crash]))
    assert found.failure_class == "app_exception"
    assert found.culprit
    assert found.culprit.rank == 1


def test_what_a_run_warned_of_and_went_on_after_is_no_failure(tmp_path: Path) -> None:
    warned = "WARNING:data:reading shard 3 failed ([Errno 104] Connection reset by peer), trying again"
    ended = "step 7/8 loss 0.4\nstep 8/8 loss 0.3\ntraining finished in 9 s"
    assert of(tmp_path, log=f"{warned}\n{ended}").failure_class == "no_failure"
    (tmp_path / "log").write_text(f"step 7/8 loss 0.4\n{warned}")
    assert triage([tmp_path]).failure_class == "peer_lost"


def test_one_step_between_two_ranks_is_no_silence(tmp_path: Path) -> None:
    ended = "W0301 10:00:07.0 70 torch/distributed/elastic/agent/server/api.py:1] Received 15 death signal"
    files = {"rank_0.log": "step 3/9 loss 1.0", "rank_1.log": "step 4/9 loss 1.0", "torchrun.log": ended}
    assert of(tmp_path, **files).failure_class == "terminated_external"
    (tmp_path / "rank_1.log").write_text("step 6/9 loss 1.0")
    found = triage([tmp_path])
    assert (found.failure_class, found.culprit and found.culprit.rank) == ("coll_timeout", 0)


CROWDED = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 139.00 GiB "
    "of which 0.40 GiB is free. {listed}Of the allocated memory {own} GiB is allocated by PyTorch, and 0.10 GiB is "
    "reserved by PyTorch but unallocated."
)


@pytest.mark.parametrize(
    ("listed", "own", "name"),
    [
        ("Process 7 has 137.00 GiB memory in use. Process 9 has 1.60 GiB memory in use. ", "1.10", "contention"),
        ("", "1.10", "contention"),
        ("", "137.00", "forward"),
        ("Including non-PyTorch memory, this process has 1.60 GiB memory in use. ", "1.10", "contention"),
        ("Including non-PyTorch memory, this process has 138.00 GiB memory in use. ", "137.00", "forward"),
        ("Process 7 has 138.00 GiB memory in use. ", "137.00", "forward"),
    ],
)
def test_another_processs_memory_is_told_from_a_job_that_is_too_big(
    tmp_path: Path, listed: str, own: str, name: str
) -> None:
    assert of(tmp_path, log=CROWDED.format(listed=listed, own=own)).failure_class == f"oom_gpu_{name}"


def test_nccls_last_error_says_more_than_its_code(tmp_path: Path) -> None:
    code = (
        "[rank0]: torch.distributed.DistBackendError: NCCL error in: /x/NCCLUtils.cpp:94, invalid usage (run with NCCL"
    )
    last = "[rank0]: Last error:\n[rank0]: Bootstrap : no socket interface found"
    assert of(tmp_path, log=f"{code}\n{last}").failure_class == "nccl_bootstrap_net"
    (tmp_path / "log").write_text(code)
    assert triage([tmp_path]).failure_class == "nccl_invalid_usage"


def test_the_optimizers_own_frame_says_that_it_was_the_optimizer(tmp_path: Path) -> None:
    frames = [("train.py", "training_step"), ("torch/optim/optimizer.py", "wrapper"), ("torch/optim/adamw.py", "_init")]
    body = "".join(f'  File "/x/{file}", line 7, in {name}\n    do()\n' for file, name in frames)
    found = of(tmp_path, log=f"Traceback (most recent call last):\n{body}{OOM.format(gpu=0)}")
    assert found.failure_class == "oom_gpu_optimizer"


WATCHDOG = (
    "[rank{rank}]:[E1122 03:09:58.0 ProcessGroupNCCL.cpp:697] [Rank {rank}] Watchdog caught collective operation "
    "timeout: WorkNCCL(SeqNum=4, OpType={what}, NumelIn={size}, NumelOut={size}, Timeout(ms)=6000) ran for 6001 "
    "milliseconds before timing out.\nterminate called after throwing an instance of 'c10::DistBackendError'\n"
    "Fatal Python error: Aborted"
)


def test_an_abort_after_a_time_out_is_no_crash_of_its_own(tmp_path: Path) -> None:
    waited = WATCHDOG.format(rank=0, what="ALLREDUCE", size=1024)
    found = of(tmp_path, log=f"{waited}\n{TABLE.format(other=72, listed=72)}")
    assert (found.failure_class, found.culprit and found.culprit.rank) == ("coll_timeout", 1)
    other = WATCHDOG.format(rank=1, what="ALLREDUCE", size=2048)
    (tmp_path / "log").write_text(f"{waited}\n{other}")
    assert triage([tmp_path]).failure_class == "coll_mismatch"
    (tmp_path / "log").write_text("[rank0]: step 3/9\nFatal Python error: Aborted")
    assert triage([tmp_path]).failure_class == "app_exception"


MENTIONED = """\
No valid checkpoint found in output directory, training from scratch
trust_remote_code is set; this model's custom code is used
quantization: none (bnb_4bit_compute_dtype is ignored)
adapter_config.json written to out
invalid JSON in line 17 of train.jsonl, row skipped
retrying download (Connection reset by peer), attempt 2
port 29500 is in use, using 29501
batch size 7 is not divisible by 2, last batch dropped
flash_attn is not installed, falling back to sdpa
Could not load library libcudnn_ops.so, cuDNN is not used
Permission denied while writing the cache, going on without
kv cache dtype fp8 is not supported on this device, auto is used
memory usage threshold set to 95%
time limit of this job: 01:00:00
signal handler for SIGTERM installed"""


@pytest.mark.parametrize("line", MENTIONED.splitlines())
def test_what_a_run_only_mentions_is_no_failure_even_where_the_log_is_cut(tmp_path: Path, line: str) -> None:
    cut = f"step 1/90 loss 2.1\n{line}\nstep 2/90 loss 2.0\n"
    assert of(tmp_path, log=cut).failure_class == "unknown"
    (tmp_path / "log").write_text(f"{cut}step 90/90 loss 1.0\n{{'train_runtime': 3.0}}\n")
    assert triage([tmp_path]).failure_class == "no_failure"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("ValueError: Unexpected keyword argument bnb_4bit_quant_tpye", "quant_setup"),
        ("ValueError: `.half()` is not supported for quantized model.", "quant_setup"),
        ("ValueError: Can't find 'adapter_config.json' at 'out'", "peft_config"),
        ("Memory on the node was 60.1GB / 62.0GB, which exceeds the memory usage threshold of 0.95.", "oom_host"),
        ("RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy requests.",
         "serve_oom_profile"),
        ("harness.payload.model.TargetError: LoRA target `odd` matches nothing in this model.", "peft_config"),
    ],
)  # fmt: skip
def test_the_same_words_in_an_error_are_one(tmp_path: Path, line: str, name: str) -> None:
    assert of(tmp_path, log=f"step 1/90 loss 2.1\n{line}\n").failure_class == name


def test_the_rank_that_the_launcher_saw_fail_did_not_survive_its_error(tmp_path: Path) -> None:
    table = TABLE.replace(" 1 (local_rank: 1)", " 9 (local_rank: 9)").replace(
        " 0 (local_rank: 0)", " 1 (local_rank: 1)"
    )
    raised = "[rank1]: AssertionError: labels outside the classes"
    found = of(tmp_path, log=f"step 2/8\n{raised}\nstep 3/8\n{table.format(other=72, listed=72)}")
    assert (found.failure_class, found.culprit and found.culprit.rank) == ("app_exception", 1)
    failed = "E0301 10:11:10.139000 70 torch/x/api.py:986] failed (exitcode: -6) local_rank: 0"  # 139 is no exit code
    waited = WATCHDOG.format(rank=0, what="ALLREDUCE", size=8)
    (tmp_path / "log").write_text(f"{failed}\n{waited}")
    assert triage([tmp_path]).failure_class == "coll_timeout"


def test_a_kill_after_a_time_out_is_of_whoever_ended_the_rest_in_any_file(tmp_path: Path) -> None:
    files = {"r1.log": "[2026-03-09 00:57:15 TP1] Watchdog timeout (self.watchdog_timeout=300)\n"}
    late = "[2026-03-09 00:57:20] Received sigquit from a child process.\nKilled\n"
    assert of(tmp_path, **files, **{"launcher.log": late}).failure_class == "coll_timeout"
    early = late.replace("00:57:20", "00:50:20")
    assert of(tmp_path, **files, **{"launcher.log": early}).failure_class == "oom_host"
